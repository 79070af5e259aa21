import math

import pytest
import torch

from data_pipeline.order import ReadPosition
from trainer.health import NanWatch, TrainingError, diagnose
from trainer.metrics import MetricValues


def values(**changes):
    healthy = {
        "num_samples": 100_000,
        "label_rate": 0.25,
        "auc": 0.78,
        "auc_error_bound": 1e-7,
        "logloss": 0.45,
        "ne": 0.8,
        "calibration": 1.0,
        "prediction_std": 0.15,
    }
    return MetricValues(**{**healthy, **changes})


def test_a_healthy_model_is_left_in_peace():
    assert diagnose(values(), "validation") == []
    assert diagnose(values(num_samples=100, auc=0.5), "validation") == [], "too few samples to say anything"
    assert diagnose(values(auc=math.nan), "validation") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auc": 0.503}, "AUC on test is 0.5030, no better than chance"),
        ({"auc": 0.5, "prediction_std": 1e-6}, "the output is constant on test"),
        ({"ne": 1.02}, "NE on test is 1.0200, worse than always predicting the label rate"),
        ({"calibration": 3.0}, "calibration on test is 3.000"),
    ],
)
def test_a_sick_model_is_told_its_symptom(changes, message):
    findings = diagnose(values(**changes), "test")
    assert [message in finding for finding in findings] == [True]


def watch_losses(ranks, losses):
    watch = NanWatch(ranks.device)
    for step, loss in enumerate(losses):
        watch.watch(torch.tensor(loss[ranks.rank]), step, ReadPosition(0, 100 * (step + 1)), 100)
    try:
        watch.check(ranks.group)
    except TrainingError as error:
        return str(error)
    return None


def test_nan_on_one_rank_stops_all_and_names_the_batch(two_ranks):
    messages = two_ranks.run(watch_losses, [(0.5, 0.5), (0.4, math.nan), (math.inf, 0.3)])
    assert messages[0] == messages[1]
    assert "the loss of step 1 is NaN or infinite" in messages[0]
    assert "the 100 samples before sample 200 of epoch 0" in messages[0]


def test_finite_losses_pass(two_ranks):
    assert two_ranks.run(watch_losses, [(0.5, 0.5), (0.4, 0.1)]) == [None, None]
