"""How two models' scores of the same samples differ: quality of each, and how much of the difference is noise.

Log loss, NE and calibration come from the code of training (`papilio.trainer.metrics`). The AUC is exact here:
training's, of binned scores, is within 1e-5, which is as much as int8 tables may cost.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from papilio.trainer.inference.export.quality_report import (
    CalibrationPoint,
    Comparison,
    Differences,
    Histogram,
    Quality,
    Ratio,
    Scatter,
)
from papilio.trainer.inference.package.format import PackageError
from papilio.trainer.metrics import ClickMetrics

Floats = NDArray[np.floating]
Doubles = NDArray[np.float64]

# Two-sided 95 % of a normal distribution.
NORMAL_95 = 1.959964
DIFFERENCE_QUANTILES = (0.5, 0.9, 0.99, 0.999)
# Random pairs of samples asked whether their order changed: the share is then known to 0.05 % or better.
NUM_PAIRS = 1 << 20
NUM_CALIBRATION_BINS = 20
NUM_SCATTER_BINS = (48, 25)
NUM_HISTOGRAM_BINS = 61


class ComparisonError(PackageError):
    """The samples cannot tell two models apart; the message says why."""


def compare_scores(reference: Floats, candidate: Floats, labels: NDArray[np.generic]) -> Comparison:
    """Compare logits of two models.

    Args:
        reference: [N] logits of the model to be matched.
        candidate: [N] logits of the other one.
        labels: [N], 0 or 1.

    Raises:
        ComparisonError: labels are of one kind only, or a score is not a number.
    """
    clicks = np.asarray(labels) > 0
    check_samples(reference, candidate, clicks)
    aucs, covariance = delong(np.stack([reference, candidate]), clicks)
    losses = [sample_losses(logits, clicks) for logits in (reference, candidate)]
    probabilities = [sigmoid(logits) for logits in (reference, candidate)]
    qualities = [_quality(auc, logits, clicks) for auc, logits in zip(aucs, (reference, candidate), strict=True)]
    return Comparison(
        num_samples=len(clicks),
        label_rate=float(clicks.mean()),
        reference=qualities[0],
        candidate=qualities[1],
        auc_ratio=_auc_ratio(aucs, covariance),
        auc_difference_error=math.sqrt(max(0.0, covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])),
        ne_ratio=_mean_ratio(losses[0], losses[1]),
        differences=_differences(probabilities[0], probabilities[1]),
        reference_calibration=calibration_curve(probabilities[0], clicks),
        candidate_calibration=calibration_curve(probabilities[1], clicks),
    )


def delong(scores: Floats, clicks: NDArray[np.bool_]) -> tuple[Doubles, Doubles]:
    """Return the AUC of each row of `scores` [M, N] and the covariance [M, M] of these over samples.

    DeLong's estimate, computed by midranks (Sun and Xu, IEEE Signal Processing Letters 2014); ties count half.
    """
    num_clicks = int(clicks.sum())
    num_others = len(clicks) - num_clicks
    above_others = np.empty((len(scores), num_clicks))
    below_clicks = np.empty((len(scores), num_others))
    for model, row in enumerate(scores):
        ranks = midranks(row)
        above_others[model] = (ranks[clicks] - midranks(row[clicks])) / num_others
        below_clicks[model] = 1 - (ranks[~clicks] - midranks(row[~clicks])) / num_clicks
    aucs = above_others.mean(axis=1)
    return aucs, _mean_covariance(above_others) + _mean_covariance(below_clicks)


def exact_auc(scores: Floats, clicks: NDArray[np.bool_]) -> float:
    """Return the AUC of scores [N]; ties count half."""
    num_clicks = int(clicks.sum())
    above = float(midranks(scores)[clicks].sum()) - num_clicks * (num_clicks + 1) / 2
    return above / (num_clicks * (len(clicks) - num_clicks))


def midranks(values: Floats) -> Doubles:
    """Return ranks from 1; equal values share the mean of theirs."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    is_first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    firsts = np.flatnonzero(is_first)
    ends = np.append(firsts[1:], len(values))
    ranks = np.empty(len(values))
    ranks[order] = ((firsts + 1 + ends) / 2)[np.cumsum(is_first) - 1]
    return ranks


def sigmoid(logits: Floats) -> Doubles:
    """Return probabilities [N] in double precision."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * np.asarray(logits, np.float64))))


def sample_losses(logits: Floats, clicks: NDArray[np.bool_]) -> Doubles:
    """Return the binary cross-entropy of each sample, in nats."""
    signed = np.where(clicks, -1.0, 1.0) * np.asarray(logits, np.float64)
    return np.asarray(np.logaddexp(0, signed))


def expected_loss_increases(reference: Floats, candidate: Floats) -> Doubles:
    """Return for each sample how much its loss is expected to grow if the reference's probability is the true one.

    This is the Kullback-Leibler divergence of the two predictions. It is the mean increase that labels would show, were
    there many for each sample, without the noise of the one label that there is.
    """
    probabilities = sigmoid(reference)
    first, second = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    # log(1 + e^second) - log(1 + e^first) - p (second - first), by what does not cancel for small differences.
    step = second - first
    grown = np.log1p(probabilities * np.expm1(np.clip(step, -50, 50)))
    return np.asarray(np.maximum(grown - probabilities * step, 0.0))


def calibration_curve(
    probabilities: Doubles, clicks: NDArray[np.bool_], num_bins: int = NUM_CALIBRATION_BINS
) -> tuple[CalibrationPoint, ...]:
    """Return points of equally many samples each, in the order of their scores."""
    order = np.argsort(probabilities, kind="stable")
    parts = np.array_split(order, min(num_bins, len(order)))
    return tuple(
        CalibrationPoint(
            predicted=float(probabilities[part].mean()), observed=float(clicks[part].mean()), num_samples=len(part)
        )
        for part in parts
    )


def check_samples(reference: Floats, candidate: Floats, clicks: NDArray[np.bool_]) -> None:
    """Make sure that scores of samples can be compared.

    Raises:
        ComparisonError: labels are of one kind only, or a score is not a number.
    """
    num_clicks = int(clicks.sum())
    if num_clicks < 2 or len(clicks) - num_clicks < 2:
        raise ComparisonError(
            f"{len(clicks):,} samples, {num_clicks:,} of them positive, cannot tell how well a model ranks: at least "
            "two positive and two negative ones are needed; give more held-out data (--data DIR)"
        )
    for name, scores in (("reference", reference), ("quantized", candidate)):
        num_bad = int(np.count_nonzero(~np.isfinite(scores)))
        if num_bad:
            raise ComparisonError(
                f"the {name} model gives {num_bad:,} of {len(scores):,} samples a score that is not a finite number; "
                "look for NaN or infinity in the checkpoint (papilio checkpoint verify) or in the dense inputs"
            )


def _mean_covariance(values: Doubles) -> Doubles:
    return np.asarray(np.atleast_2d(np.cov(values)) / values.shape[1])


def _quality(auc: float, logits: Floats, clicks: NDArray[np.bool_]) -> Quality:
    metrics = ClickMetrics(torch.device("cpu"))
    metrics.update(torch.from_numpy(np.ascontiguousarray(logits)), torch.from_numpy(clicks))
    values = metrics.compute_local()
    return Quality(auc=float(auc), ne=values.ne, logloss=values.logloss, calibration=values.calibration)


def _auc_ratio(aucs: Doubles, covariance: Doubles) -> Ratio:
    ratio = float(aucs[1] / aucs[0])
    # The first-order variance of a quotient.
    variance = covariance[1, 1] - 2 * ratio * covariance[0, 1] + ratio * ratio * covariance[0, 0]
    return _interval(ratio, math.sqrt(max(0.0, float(variance))) / float(aucs[0]))


def _mean_ratio(first: Doubles, second: Doubles) -> Ratio:
    ratio = float(second.mean() / first.mean())
    error = float(np.std(second - ratio * first)) / math.sqrt(len(first)) / float(first.mean())
    return _interval(ratio, error)


def _interval(value: float, error: float) -> Ratio:
    return Ratio(value=value, low=value - NORMAL_95 * error, high=value + NORMAL_95 * error)


def _differences(first: Doubles, second: Doubles) -> Differences:
    difference = second - first
    absolute = np.abs(difference)
    quantiles = np.quantile(absolute, DIFFERENCE_QUANTILES)
    return Differences(
        mean=float(difference.mean()),
        max_absolute=float(absolute.max()),
        absolute_quantiles={str(q): float(value) for q, value in zip(DIFFERENCE_QUANTILES, quantiles, strict=True)},
        rank_correlation=_correlation(midranks(first), midranks(second)),
        swapped_pairs_share=_swapped_share(first, second),
        scatter=_scatter(first, difference, float(quantiles[-1])),
        histogram=_histogram(difference, float(quantiles[2])),
    )


def _correlation(first: Doubles, second: Doubles) -> float:
    first, second = first - first.mean(), second - second.mean()
    scale = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / scale if scale else 1.0


def _swapped_share(first: Doubles, second: Doubles) -> float:
    generator = np.random.default_rng(0)
    one, other = generator.integers(0, len(first), (2, NUM_PAIRS))
    return float(((first[one] - first[other]) * (second[one] - second[other]) < 0).mean())


def _scatter(first: Doubles, difference: Doubles, limit: float) -> Scatter:
    num_columns, num_rows = NUM_SCATTER_BINS
    limit = limit or 1e-9
    columns = np.clip((first * num_columns).astype(int), 0, num_columns - 1)
    rows = np.clip(((difference + limit) / (2 * limit) * num_rows).astype(int), 0, num_rows - 1)
    counts = np.bincount(rows * num_columns + columns, minlength=num_rows * num_columns)
    return Scatter(limit=limit, counts=tuple(tuple(map(int, row)) for row in counts.reshape(num_rows, num_columns)))


def _histogram(difference: Doubles, limit: float) -> Histogram:
    limit = limit or 1e-9
    inside = difference[np.abs(difference) <= limit]
    counts, _ = np.histogram(inside, NUM_HISTOGRAM_BINS, (-limit, limit))
    return Histogram(limit=limit, counts=tuple(map(int, counts)), num_beyond=len(difference) - len(inside))
