"""What one step computes: a batch in, a loss and the outputs to be measured out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from papilio.data_pipeline.loading.batch import Batch
from papilio.data_pipeline.loading.order import ReadPosition


class StepOutput(NamedTuple):
    """Of a rank's slice: `loss`, `logits` [B], `labels` [B], none with a gradient; and the batch's place."""

    loss: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor
    position: ReadPosition
    global_batch_size: int


class TrainModel(nn.Module):
    """A click model with its loss, the mean binary cross-entropy over the global batch.

    A rank returns its own sum of losses * world size / global batch size: DDP and TorchRec's all-to-all both average
    gradients over ranks, so ranks may have different numbers of samples, or none. Padding has no loss. With replicated
    groups the all-to-all averages over a group's ranks only, and its tables see the mean over its own samples.
    """

    def __init__(self, model: nn.Module, world_size: int, autocast_dtype: torch.dtype | None, device_type: str) -> None:
        super().__init__()
        self.model = model
        self._world_size = world_size
        self._autocast_dtype = autocast_dtype
        self._device_type = device_type

    def forward(self, batch: Batch) -> tuple[torch.Tensor, StepOutput]:
        """Return the loss (a scalar) and the outputs."""
        with torch.autocast(self._device_type, self._autocast_dtype, enabled=self._autocast_dtype is not None):
            logits = self.model(batch.dense_features, batch.sparse_features)
        logits = logits.float()[: batch.num_samples]
        labels = batch.labels[: batch.num_samples]
        total = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        loss = total * (self._world_size / batch.global_batch_size)
        return loss, StepOutput(loss.detach(), logits.detach(), labels, batch.position, batch.global_batch_size)
