import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from papilio.data_pipeline.loading.order import ReadPosition
from papilio.trainer.metrics import MetricValues
from papilio.trainer.run.learning_alerts import NanWatch, TrainingError, diagnose, diagnose_labels


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
    assert diagnose(values(num_samples=200, auc=0.7, calibration=0.8), "validation") == [], "50 clicks tell no more"
    assert diagnose(values(num_samples=0, auc=math.nan), "validation") == [], "nothing was measured"
    assert diagnose(values(label_rate=0.001, prediction_std=2e-4), "test") == [], "few clicks, small outputs"


@pytest.mark.parametrize(("num_clicks", "num_others"), [(30, 170), (1_000, 1_500)])
def test_an_auc_that_random_scores_reach_is_chance(num_clicks, num_others):
    """Of random orders one in 44 is two standard deviations or more above one half."""
    generator = np.random.default_rng(0)
    labels = np.repeat([1.0, 0.0], [num_clicks, num_others])
    aucs = [roc_auc_score(labels, generator.random(len(labels))) for _ in range(150)]
    spread = float(np.std(aucs))
    counts = {"num_samples": num_clicks + num_others, "label_rate": num_clicks / (num_clicks + num_others)}
    for errors, words in ((-2, "no better than chance"), (0, "no better than chance"), (1.7, "tell from chance")):
        assert words in diagnose(values(**counts, auc=0.5 + errors * spread), "validation")[0]
    assert diagnose(values(**counts, auc=0.5 + 2.3 * spread), "validation") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auc": 0.503}, "AUC on test is 0.5030, no better than chance"),
        ({"auc": 0.5, "prediction_std": 1e-6}, "the output is constant on test"),
        ({"auc": 0.484, "prediction_std": 1e-5, "num_samples": 90}, "the output is constant on test"),
        ({"ne": 1.02}, "NE on test is 1.0200, no better than always predicting the label rate"),
        ({"ne": 1.0}, "NE on test is 1.0000, no better than always predicting the label rate"),
        ({"calibration": 3.0}, "calibration on test is 3.000"),
        ({"calibration": 0.676, "num_samples": 400}, "calibration on test is 0.676"),
        ({"calibration": 0.0}, "calibration on test is 0.000"),
        ({"label_rate": 1.0, "auc": math.nan, "num_samples": 9}, "label rate on test is 1: all 9 labels are the same"),
        ({"label_rate": 0.0, "auc": math.nan, "ne": math.nan, "calibration": math.nan}, "label rate on test is 0: all"),
        ({"logloss": math.nan, "ne": math.nan}, "outputs on test are NaN or infinite"),
    ],
)
def test_a_sick_model_is_told_its_symptom(changes, message):
    findings = diagnose(values(**changes), "test")
    assert [message in finding for finding in findings] == [True]


def test_labels_of_one_class_are_told_before_training():
    assert diagnose_labels(403, 200) == diagnose_labels(0, 0) == []
    (finding,) = diagnose_labels(403, 403)
    assert finding.startswith(
        "label rate on train is 1: all 403 labels are the same, so there is nothing to learn from"
    )


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
