"""Metrics against scikit-learn, over ranks and batches of any size."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from papilio.trainer.metrics import BUFFER_SAMPLES, ClickMetrics


def make_scores(count, seed=0, shift=-1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, generator=generator) * 1.5 + shift
    labels = (torch.rand(count, generator=generator) < torch.sigmoid(0.7 * logits)).float()
    return logits, labels


def measure(ranks, logits, labels, sizes):
    """Give each rank its share of the samples in batches of `sizes`."""
    metrics = ClickMetrics(ranks.device)
    logits, labels = logits[ranks.rank :: ranks.world_size], labels[ranks.rank :: ranks.world_size]
    start = 0
    for size in sizes:
        metrics.update(logits[start : start + size], labels[start : start + size])
        start += size
    metrics.update(logits[start:], labels[start:])
    first = metrics.compute(ranks.group)
    assert metrics.compute(ranks.group) == first, "computing changes nothing"
    metrics.reset()
    assert metrics.compute(ranks.group).num_samples == 0
    return first


@pytest.mark.parametrize("count", [1_001, 2 * BUFFER_SAMPLES + 5])
def test_two_ranks_measure_what_sklearn_does(two_ranks, count):
    logits, labels = make_scores(count)
    first, second = two_ranks.run(measure, logits, labels, [0, 7, 300])
    assert first == second
    probabilities = torch.sigmoid(logits.double()).numpy()
    truth = labels.numpy()
    rate = truth.mean(dtype=np.float64)
    logloss = sklearn_metrics.log_loss(truth, probabilities)
    assert first.num_samples == count
    assert first.auc == pytest.approx(
        sklearn_metrics.roc_auc_score(truth, probabilities), abs=first.auc_error_bound + 1e-12
    )
    assert first.auc_error_bound < 1e-5
    assert first.logloss == pytest.approx(logloss, rel=1e-6)
    assert first.ne == pytest.approx(logloss / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)), rel=1e-6)
    assert first.calibration == pytest.approx(probabilities.sum() / truth.sum(), rel=1e-6)
    assert first.prediction_std == pytest.approx(probabilities.std(), rel=1e-5)


def test_ties_count_half(one_rank):
    logits, labels = torch.tensor([0.0, 0.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    values = one_rank.run(measure, logits, labels, [])[0]
    assert values.auc == sklearn_metrics.roc_auc_score(labels.numpy(), logits.numpy()) == 0.75


def test_one_label_alone_has_no_auc(one_rank):
    values = one_rank.run(measure, torch.zeros(5), torch.ones(5), [])[0]
    assert math.isnan(values.auc)
    assert math.isnan(values.ne)
    assert values.logloss == pytest.approx(math.log(2))
