"""Is the run learning? A model that is not says so by name of symptom, with likely causes."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from papilio.data_pipeline.loading.order import ReadPosition
from papilio.trainer.metrics import MetricValues

# Random orders differ: an AUC is told from chance by so many standard errors of it.
CHANCE_ERRORS = 2.0
# What an AUC must be above one half at any number of samples: below, one click in a hundred pairs is ranked better.
MIN_AUC_GAIN = 0.01
# Bids and budgets are multiplied by predictions, so a fifth too much is a fifth too dear. Models that
# learned are within some percent (README: 0.98 to 1.04), split by time within a tenth: label rates drift.
MAX_MISCALIBRATION = 1.2
CALIBRATION_ERRORS = 3.0
# Outputs that vary by less than this share of p (1 - p) are constant: they could tell clicks from others to an AUC of
# some 0.503.
MIN_SPREAD = 0.01
NEVER = 1 << 62


class TrainingError(RuntimeError):
    """Training cannot continue; the message names the batch and likely causes."""


def diagnose(values: MetricValues, split: str) -> list[str]:
    """Return what is wrong with a model by its metrics on a split, a sentence each; empty for a healthy one."""
    if not values.num_samples:
        return []
    if not math.isfinite(values.logloss):
        return [f"NOT LEARNING: outputs on {split} are NaN or infinite; lower the learning rates, add warm-up"]
    if values.label_rate in (0.0, 1.0):
        return [_one_class(split, values.num_samples, values.label_rate), *_constant(values, split)]
    findings = _constant(values, split) or _chance(values, split)
    if values.ne >= 1:
        findings.append(
            f"NOT LEARNING: NE on {split} is {values.ne:.4f}, no better than always predicting the label rate (NE 1): "
            "the model diverges, or overfits (more than one epoch over a small data set does); lower the learning "
            "rates or train.epochs"
        )
    return findings + _calibration(values, split)


def diagnose_labels(num_rows: int, num_positives: int) -> list[str]:
    """Return what is wrong with the labels to learn from; empty if there are both."""
    is_one_class = num_rows > 0 and num_positives in (0, num_rows)
    return [_one_class("train", num_rows, num_positives / num_rows)] if is_one_class else []


def _one_class(split: str, num_samples: int, label_rate: float) -> str:
    consequence = "there is nothing to learn from" if split == "train" else "AUC, NE and calibration cannot be measured"
    return (
        f"label rate on {split} is {label_rate:.0f}: all {num_samples:,} labels are the same, so {consequence}; check "
        "the label column of the schema, and that the split is not sorted by label"
    )


def _constant(values: MetricValues, split: str) -> list[str]:
    mean = values.calibration * values.label_rate
    variance = mean * (1 - mean) if 0 < mean < 1 else 0.0
    if values.prediction_std >= max(MIN_SPREAD * variance, 1e-6):
        return []
    return [
        f"NOT LEARNING: the output is constant on {split} (standard deviation {values.prediction_std:.1e}, AUC "
        f"{values.auc:.4f}): the inputs may carry nothing (constant or clipped columns, unknown ids), or the learning "
        "rate may be so high that the ReLUs died, or so low that nothing moved; try a tenth, or ten times, of "
        "optimizer.dense.learning_rate, and warm-up (schedule.warmup_steps)"
    ]


def _chance(values: MetricValues, split: str) -> list[str]:
    """Compare the AUC with that of random scores, whose variance is (n + 1) / (12 clicks others) (Mann and Whitney)."""
    num_clicks = values.label_rate * values.num_samples
    num_others = values.num_samples - num_clicks
    error = CHANCE_ERRORS * math.sqrt((values.num_samples + 1) / (12 * num_clicks * num_others))
    if values.auc >= 0.5 + max(MIN_AUC_GAIN, error):
        return []
    chance = f"chance (0.5 +- {error:.4f} with {num_clicks:,.0f} clicks in {values.num_samples:,} samples)"
    if values.auc >= 0.5 + MIN_AUC_GAIN:
        return [f"AUC on {split} is {values.auc:.4f}, which so few clicks cannot tell from {chance}"]
    return [
        f"NOT LEARNING: AUC on {split} is {values.auc:.4f}, no better than {chance}: check that the label "
        "column is the label, that the training split is shuffled (data.shuffle), that ids are not all unknown (see "
        "the manifest's unknown_rate), and try another optimizer.sparse.learning_rate and optimizer.dense.learning_rate"
    ]


def _calibration(values: MetricValues, split: str) -> list[str]:
    """Compare predicted with actual clicks, whose number has a relative standard error of sqrt((1 - rate) / clicks)."""
    num_clicks = values.label_rate * values.num_samples
    error = CALIBRATION_ERRORS * math.sqrt((1 - values.label_rate) / num_clicks)
    most = max(MAX_MISCALIBRATION, 1 + error)
    if max(values.calibration, 1 / values.calibration if values.calibration else math.inf) <= most:
        return []
    return [
        f"calibration on {split} is {values.calibration:.3f}, clicks predicted over clicks seen; right is 1, and "
        f"{1 / most:.3f} to {most:.3f} passes with {num_clicks:,.0f} clicks: the label rate of training and {split} "
        "may differ, or training stopped too early"
    ]


class NanWatch:
    """Remembers the first step whose loss was not finite, without waiting for the device at every step."""

    def __init__(self, device: torch.device) -> None:
        self._first_bad_step = torch.full((), NEVER, dtype=torch.int64, device=device)
        self._batches: dict[int, str] = {}

    def watch(self, loss: torch.Tensor, step: int, position: ReadPosition, global_batch_size: int) -> None:
        """Look at a step's loss (a scalar); `position` is where reading stands after its batch of so many samples."""
        bad = torch.where(torch.isfinite(loss), NEVER, step)
        self._first_bad_step = torch.minimum(self._first_bad_step, bad)
        end = f"sample {position.sample:,} of epoch {position.epoch}" if position.sample else "the end of the epoch"
        self._batches[step] = f"the {global_batch_size:,} samples before {end}"

    def check(self, group: dist.ProcessGroup) -> None:
        """Stop if any rank saw a loss that is not finite since the last check. Collective.

        Raises:
            TrainingError: names the batch and what to do; raised on every rank.
        """
        first = self._first_bad_step.clone()
        dist.all_reduce(first, op=dist.ReduceOp.MIN, group=group)
        step = int(first.item())
        if step < NEVER:
            raise TrainingError(
                f"the loss of step {step} is NaN or infinite (steps count from 0; its batch: {self._batches[step]}). "
                "Either the learning rates are too high (lower optimizer.*.learning_rate, add schedule.warmup_steps) "
                "or a dense value is NaN or huge (see minimum and maximum in the data set's manifest)"
            )
        self._batches.clear()
