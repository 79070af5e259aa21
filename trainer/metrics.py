"""Click metrics over any number of samples in bounded memory, reduced over ranks: AUC, NE, log loss, calibration."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

# Probabilities are counted in bins of equal width. Scores that share a bin are ties to the AUC; the error this can
# make is reported with it (`auc_error_bound`), and is below 1e-5 for the scores of a trained model.
NUM_BINS = 1 << 18
# Samples gathered before they are counted: one pass over the bins costs as much as some 50,000 samples.
BUFFER_SAMPLES = 1 << 16


@dataclass(frozen=True)
class MetricValues:
    """Metrics of one set of samples.

    Attributes:
        num_samples: how many there were.
        label_rate: share of clicks.
        auc: area under the ROC curve, ties counting half; NaN without both labels.
        auc_error_bound: how far the binned AUC can be from the exact one.
        logloss: mean binary cross-entropy, in nats.
        ne: normalized entropy: log loss over that of always predicting the label rate (He et al., ADKDD 2014).
        calibration: predicted clicks over actual clicks.
        prediction_std: standard deviation of the predicted probabilities.
    """

    num_samples: int
    label_rate: float
    auc: float
    auc_error_bound: float
    logloss: float
    ne: float
    calibration: float
    prediction_std: float

    def to_dict(self) -> dict[str, float]:
        """Return plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> MetricValues:
        """Rebuild it from `to_dict`'s result, also by way of JSON, where NaN is null."""
        values: dict[str, Any] = {name: math.nan if value is None else value for name, value in tree.items()}
        return cls(**values)


class ClickMetrics:
    """Accumulates logits and labels; memory does not grow with their number."""

    def __init__(self, device: torch.device) -> None:
        self._bins = torch.zeros(2, NUM_BINS, dtype=torch.int64, device=device)
        # Sums of: log loss, probability, squared probability.
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._buffer: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._num_buffered = 0

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add samples: `logits` [B] and `labels` [B] (0 or 1), neither of which needs a gradient."""
        self._buffer.append((logits, labels))
        self._num_buffered += len(logits)
        if self._num_buffered >= BUFFER_SAMPLES:
            self._count_buffered()

    def compute(self, group: dist.ProcessGroup) -> MetricValues:
        """Return the metrics of all ranks' samples. Collective; leaves the state as it is."""
        self._count_buffered()
        bins, sums = self._bins.clone(), self._sums.clone()
        dist.all_reduce(bins, group=group)
        dist.all_reduce(sums, group=group)
        return values_from_counts(bins[0], bins[1], *sums.tolist())

    def compute_local(self) -> MetricValues:
        """Return the metrics of the samples added here, whatever other ranks have; leaves the state as it is."""
        self._count_buffered()
        return values_from_counts(self._bins[0], self._bins[1], *self._sums.tolist())

    def reset(self) -> None:
        """Forget all samples."""
        self._buffer.clear()
        self._num_buffered = 0
        self._bins.zero_()
        self._sums.zero_()

    def _count_buffered(self) -> None:
        if not self._num_buffered:
            self._buffer.clear()
            return
        logits = torch.cat([logits for logits, _ in self._buffer]).double()
        labels = torch.cat([labels for _, labels in self._buffer]).double()
        self._buffer.clear()
        self._num_buffered = 0
        probabilities = torch.sigmoid(logits)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        self._sums += torch.stack([loss, probabilities.sum(), probabilities.square().sum()])
        bins = (probabilities.nan_to_num() * NUM_BINS).long().clamp_(0, NUM_BINS - 1)
        counts = torch.bincount(bins + NUM_BINS * labels.long(), minlength=2 * NUM_BINS)
        self._bins += counts.view(2, NUM_BINS)


def values_from_counts(
    negatives: torch.Tensor, positives: torch.Tensor, loss_sum: float, probability_sum: float, square_sum: float
) -> MetricValues:
    """Compute metrics from counts per bin ([bins] int64 each) and sums over all samples."""
    num_positives, num_negatives = int(positives.sum()), int(negatives.sum())
    num_samples = num_positives + num_negatives
    if not num_samples:
        return MetricValues(0, *([math.nan] * 7))
    positives, negatives = positives.double(), negatives.double()
    num_pairs = num_positives * num_negatives
    tied_pairs = (positives * negatives).sum().item()
    pairs_above = (positives * (negatives.cumsum(0) - negatives)).sum().item()
    rate = num_positives / num_samples
    entropy = -sum(p * math.log(p) for p in (rate, 1 - rate) if p > 0)
    mean = probability_sum / num_samples
    return MetricValues(
        num_samples=num_samples,
        label_rate=rate,
        auc=(pairs_above + tied_pairs / 2) / num_pairs if num_pairs else math.nan,
        auc_error_bound=tied_pairs / 2 / num_pairs if num_pairs else math.nan,
        logloss=loss_sum / num_samples,
        ne=loss_sum / num_samples / entropy if entropy else math.nan,
        calibration=probability_sum / num_positives if num_positives else math.nan,
        prediction_std=math.sqrt(max(0.0, square_sum / num_samples - mean * mean)),
    )
