"""The table-batched embedding kernels (TBE) inside a sharded model."""

from __future__ import annotations

from collections.abc import Iterator

from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn


def iterate_tbes(model: nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """Yield this rank's TBEs, sharded or not; TorchRec keeps the lookups of a sharded module out of `modules()`."""
    for module in model.modules():
        if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen):
            yield module
        for lookup in getattr(module, "_lookups", []):
            if isinstance(lookup, nn.Module):
                yield from iterate_tbes(lookup)
