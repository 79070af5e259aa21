"""A batch as the model takes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from data_pipeline.order import ReadPosition


@dataclass
class Batch(Pipelineable):  # type: ignore[misc]  # torchrec has no type information
    """One rank's slice of a global batch; it can have no rows (B = 0) when the global batch is smaller than the world.

    Attributes:
        dense_features: [B, I] float32.
        sparse_features: keys in schema order; values and lengths int32, feature after feature.
        labels: [B] float32, 0 or 1.
        position: where reading stands once this global batch is trained on; equal on all ranks.
        global_batch_size: samples of the global batch, over all ranks.
    """

    dense_features: torch.Tensor
    sparse_features: KeyedJaggedTensor
    labels: torch.Tensor
    position: ReadPosition
    global_batch_size: int

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """Copy to a device."""
        return self._with(
            self.dense_features.to(device, non_blocking=non_blocking),
            self.sparse_features.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the batch's memory until `stream` is done with it."""
        self.dense_features.record_stream(stream)
        self.sparse_features.record_stream(stream)
        self.labels.record_stream(stream)

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory."""
        return self._with(self.dense_features.pin_memory(), self.sparse_features.pin_memory(), self.labels.pin_memory())

    def _with(self, dense: torch.Tensor, sparse: KeyedJaggedTensor, labels: torch.Tensor) -> Batch:
        return replace(self, dense_features=dense, sparse_features=sparse, labels=labels)
