"""Is the run learning? A model that is not says so by name of symptom, with likely causes."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from data_pipeline.order import ReadPosition
from trainer.metrics import MetricValues

# Below this many samples an AUC says little: its standard error is some 0.5 / sqrt(clicks).
MIN_SAMPLES = 2_000
NEVER = 1 << 62


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the batch and likely causes."""


def diagnose(values: MetricValues, split: str) -> list[str]:
    """Return what is wrong with a model by its metrics on a split, a sentence each; empty for a healthy one."""
    findings: list[str] = []
    if values.num_samples < MIN_SAMPLES or math.isnan(values.auc):
        return findings
    num_clicks = values.label_rate * values.num_samples
    noise = 3 * 0.5 / math.sqrt(max(1.0, min(num_clicks, values.num_samples - num_clicks)))
    if values.prediction_std < 1e-4:
        findings.append(
            f"the output is constant on {split} (standard deviation {values.prediction_std:.1e}): the learning rate "
            "may be so high that the ReLUs died, or so low that nothing moved; try a tenth, or ten times, of "
            "optimizer.dense.learning_rate, and warm-up (schedule.warmup_steps)"
        )
    elif values.auc < 0.5 + max(0.01, noise):
        findings.append(
            f"AUC on {split} is {values.auc:.4f}, no better than chance: check that the label column is the label, "
            "that the training split is shuffled (data.shuffle), that ids are not all unknown (see the manifest's "
            "unknown_rate), and try another optimizer.sparse.learning_rate and optimizer.dense.learning_rate"
        )
    if values.ne > 1:
        findings.append(
            f"NE on {split} is {values.ne:.4f}, worse than always predicting the label rate: the model diverges, or "
            "overfits (more than one epoch over a small data set does); lower the learning rates or train.epochs"
        )
    if not 0.5 <= values.calibration <= 2:
        findings.append(
            f"calibration on {split} is {values.calibration:.3f} (1 is right): the label rate of training and {split} "
            "may differ, or training stopped too early"
        )
    return findings


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
