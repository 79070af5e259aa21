"""Comparisons of scores against scikit-learn, SciPy and what resampling shows."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import calibration as sklearn_calibration
from sklearn import metrics as sklearn_metrics

from papilio.trainer.inference.export.comparison import (
    DIFFERENCE_QUANTILES,
    NUM_HISTOGRAM_BINS,
    NUM_SCATTER_BINS,
    ComparisonError,
    calibration_curve,
    compare_scores,
    delong,
    exact_auc,
    expected_loss_increases,
    midranks,
)
from papilio.trainer.metrics import ClickMetrics


def make_scores(count, noise=0.05, seed=0):
    """Logits of a model, of one that is a little off, and labels."""
    generator = np.random.default_rng(seed)
    first = generator.normal(-1, 1.4, count).astype(np.float32)
    second = (first + generator.normal(0.01, noise, count)).astype(np.float32)
    labels = (generator.random(count) < sigmoid(first)).astype(np.uint8)
    return first, second, labels


def sigmoid(values):
    return 1 / (1 + np.exp(-np.asarray(values, np.float64)))


def sklearn_quality(logits, labels):
    probabilities = sigmoid(logits)
    logloss = sklearn_metrics.log_loss(labels, probabilities)
    always = sklearn_metrics.log_loss(labels, np.full(len(labels), labels.mean()))
    auc = sklearn_metrics.roc_auc_score(labels, logits)
    return auc, logloss / always, logloss, probabilities.sum() / labels.sum()


def test_quality_is_what_sklearn_finds():
    first, second, labels = make_scores(5_001)
    found = compare_scores(first, second, labels)
    for quality, logits in ((found.reference, first), (found.candidate, second)):
        values = (quality.auc, quality.ne, quality.logloss, quality.calibration)
        np.testing.assert_allclose(values, sklearn_quality(logits, labels), rtol=1e-9)
    assert found.num_samples == 5_001
    assert found.label_rate == labels.mean()
    assert found.auc_ratio.value == found.candidate.auc / found.reference.auc
    np.testing.assert_allclose(found.ne_ratio.value, found.candidate.ne / found.reference.ne, rtol=1e-12)


def test_quality_is_what_training_reports():
    first, second, labels = make_scores(3_000)
    metrics = ClickMetrics(torch.device("cpu"))
    metrics.update(torch.from_numpy(first), torch.from_numpy(labels))
    trained, found = metrics.compute_local(), compare_scores(first, second, labels).reference
    assert (trained.ne, trained.logloss, trained.calibration) == (found.ne, found.logloss, found.calibration)
    assert abs(trained.auc - found.auc) <= trained.auc_error_bound


def test_ties_count_half():
    generator = np.random.default_rng(1)
    scores = generator.integers(0, 9, (2, 700)).astype(np.float32)
    clicks = generator.random(700) < 0.3
    expected = [sklearn_metrics.roc_auc_score(clicks, row) for row in scores]
    np.testing.assert_allclose(delong(scores, clicks)[0], expected, rtol=1e-12)
    np.testing.assert_allclose([exact_auc(row, clicks) for row in scores], expected, rtol=1e-12)
    np.testing.assert_array_equal(midranks(scores[0]), stats.rankdata(scores[0]))


def test_delongs_covariance_is_that_of_the_definition():
    generator = np.random.default_rng(2)
    scores = generator.normal(size=(2, 60)).round(1)
    clicks = generator.random(60) < 0.4
    clicked, others = scores[:, clicks], scores[:, ~clicks]
    wins = (clicked[:, :, None] > others[:, None, :]) + 0.5 * (clicked[:, :, None] == others[:, None, :])
    expected = np.cov(wins.mean(2)) / clicks.sum() + np.cov(wins.mean(1)) / (~clicks).sum()
    np.testing.assert_allclose(delong(scores, clicks)[1], expected, rtol=1e-10)


def test_intervals_are_as_wide_as_resampling_shows():
    first, second, labels = make_scores(2_000, noise=0.4)
    found = compare_scores(first, second, labels)
    generator = np.random.default_rng(3)
    ratios = []
    for _ in range(300):
        drawn = generator.integers(0, len(labels), len(labels))
        auc_1, ne_1, *_ = sklearn_quality(first[drawn], labels[drawn])
        auc_2, ne_2, *_ = sklearn_quality(second[drawn], labels[drawn])
        ratios.append((auc_2 / auc_1, ne_2 / ne_1, auc_2 - auc_1))
    spread = np.std(ratios, axis=0)
    widths = [(ratio.high - ratio.low) / 2 / 1.96 for ratio in (found.auc_ratio, found.ne_ratio)]
    # The error of a standard deviation from 300 draws is 4 %.
    np.testing.assert_allclose([*widths, found.auc_difference_error], spread, rtol=0.15)


def test_a_model_beside_itself_differs_in_nothing():
    first, _, labels = make_scores(500)
    found = compare_scores(first, first, labels)
    assert (found.auc_ratio.value, found.auc_ratio.low, found.auc_ratio.high) == (1, 1, 1)
    assert (found.ne_ratio.value, found.ne_ratio.low, found.ne_ratio.high) == (1, 1, 1)
    differences = found.differences
    assert (differences.max_absolute, differences.swapped_pairs_share, differences.mean) == (0, 0, 0)
    assert differences.rank_correlation == pytest.approx(1, abs=1e-12)
    assert sum(differences.histogram.counts) == 500


def test_the_expected_increase_is_the_mean_over_labels():
    first, second = np.array([-3.0, 0.2, 4.0, 1.0]), np.array([-2.0, 0.3, -6.0, 1.0])
    p, q = sigmoid(first), sigmoid(second)
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(expected_loss_increases(first, second), expected, rtol=1e-9, atol=1e-15)


def test_the_expected_increase_of_tiny_steps_does_not_cancel():
    first = np.linspace(-5, 5, 11)
    step = 1e-7
    p = sigmoid(first)
    # Second order of the divergence: p (1 - p) step^2 / 2.
    found = expected_loss_increases(first, first + step)
    np.testing.assert_allclose(found, p * (1 - p) * step**2 / 2, rtol=1e-2)


def test_differences_are_those_of_the_probabilities():
    first, second, labels = make_scores(4_000)
    found = compare_scores(first, second, labels).differences
    change = sigmoid(second) - sigmoid(first)
    assert found.mean == pytest.approx(change.mean(), rel=1e-9)
    assert found.max_absolute == pytest.approx(np.abs(change).max(), rel=1e-9)
    expected = {str(q): np.quantile(np.abs(change), q) for q in DIFFERENCE_QUANTILES}
    assert found.absolute_quantiles == pytest.approx(expected, rel=1e-9)
    assert found.rank_correlation == pytest.approx(stats.spearmanr(first, second).statistic, rel=1e-9)


def test_the_share_of_swapped_pairs():
    first, second, labels = make_scores(400, noise=0.3)
    pairs = list(itertools.product(range(400), repeat=2))
    swapped = sum((first[i] - first[j]) * (second[i] - second[j]) < 0 for i, j in pairs) / len(pairs)
    # A share of a million pairs has an error of 0.05 % at most.
    assert compare_scores(first, second, labels).differences.swapped_pairs_share == pytest.approx(swapped, abs=2e-3)


def test_scatter_and_histogram_count_every_sample():
    first, second, labels = make_scores(3_000)
    found = compare_scores(first, second, labels).differences
    counts = np.array(found.scatter.counts)
    num_columns, num_rows = NUM_SCATTER_BINS
    assert counts.shape == (num_rows, num_columns)
    assert counts.sum() == 3_000
    expected, _ = np.histogram(sigmoid(first), num_columns, (0, 1))
    np.testing.assert_array_equal(counts.sum(axis=0), expected)
    change, limit = sigmoid(second) - sigmoid(first), found.histogram.limit
    assert found.histogram.num_beyond == np.sum(np.abs(change) > limit)
    expected, _ = np.histogram(change[np.abs(change) <= limit], NUM_HISTOGRAM_BINS, (-limit, limit))
    np.testing.assert_array_equal(found.histogram.counts, expected)
    # Rows are differences, the lowest first.
    assert counts[: num_rows // 2].sum() == pytest.approx(np.sum(change < -limit / num_rows), abs=150)


def test_the_calibration_curve_is_sklearns():
    first, _, labels = make_scores(2_000)
    points = calibration_curve(sigmoid(first), labels > 0, 20)
    observed, predicted = sklearn_calibration.calibration_curve(labels, sigmoid(first), n_bins=20, strategy="quantile")
    np.testing.assert_allclose([point.predicted for point in points], predicted, atol=2e-3)
    np.testing.assert_allclose([point.observed for point in points], observed, atol=0.011)
    assert [point.num_samples for point in points] == [100] * 20


def test_samples_that_cannot_tell_are_refused():
    scores = np.zeros(5, np.float32)
    with pytest.raises(ComparisonError, match=r"5 samples, 1 of them positive, cannot tell .* give more held-out data"):
        compare_scores(scores, scores, np.array([1, 0, 0, 0, 0]))
    with pytest.raises(ComparisonError, match="5 samples, 4 of them positive, cannot tell"):
        compare_scores(scores, scores, np.array([1, 1, 1, 0, 1]))
    bad = np.array([0, math.nan, math.inf, 0, 0], np.float32)
    with pytest.raises(ComparisonError, match=r"the quantized model gives 2 of 5 samples a score that is not a finite"):
        compare_scores(scores, bad, np.array([1, 1, 0, 0, 1]))
    with pytest.raises(ComparisonError, match="the reference model gives 2 of 5 samples"):
        compare_scores(bad, scores, np.array([1, 1, 0, 0, 1]))
