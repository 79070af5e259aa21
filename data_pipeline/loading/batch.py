"""A batch as the model takes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from papilio.data_pipeline.loading.order import ReadPosition


@dataclass
class Batch(Pipelineable):  # type: ignore[misc]  # torchrec has no type information
    """One rank's slice of a global batch, padded to the size of the largest slice.

    All ranks' slices have B rows, as collectives over them need (gloo cannot gather uneven parts). The first
    `num_samples` are samples, maybe none; the rest is padding: zeros and empty bags.

    Attributes:
        dense_features: [B, I] float32.
        sparse_features: keys in schema order; values and lengths int32, feature after feature.
        labels: [B] float32, 0 or 1.
        position: where reading stands once this global batch is trained on; equal on all ranks.
        global_batch_size: samples of the global batch, over all ranks.
        num_samples: rows of this slice that are samples.
    """

    dense_features: torch.Tensor
    sparse_features: KeyedJaggedTensor
    labels: torch.Tensor
    position: ReadPosition
    global_batch_size: int
    num_samples: int

    def padded_to(self, size: int) -> Batch:
        """Add rows of zeros and empty bags up to `size` rows."""
        num_rows = size - len(self.labels)
        if not num_rows:
            return self
        features = self.sparse_features
        lengths_FB = features.lengths().view(len(features.keys()), -1)
        padded = KeyedJaggedTensor(
            keys=features.keys(),
            values=features.values(),
            lengths=torch.nn.functional.pad(lengths_FB, (0, num_rows)).flatten(),
            stride=size,
            length_per_key=features.length_per_key(),
            offset_per_key=features.offset_per_key(),
        )
        dense = torch.nn.functional.pad(self.dense_features, (0, 0, 0, num_rows))
        return self._with(dense, padded, torch.nn.functional.pad(self.labels, (0, num_rows)))

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
