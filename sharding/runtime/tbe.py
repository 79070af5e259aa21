"""The table-batched embedding kernels (TBE) inside a sharded model."""

from __future__ import annotations

from collections.abc import Iterator

from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from papilio.sharding.compat.torchrec_internals import lookups_of


def iterate_tbes(model: nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """Yield this rank's TBEs, sharded or not; TorchRec keeps the lookups of a sharded module out of `modules()`."""
    for module in model.modules():
        if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen):
            yield module
        if isinstance(module, ShardedEmbeddingBagCollection):
            for lookup in lookups_of(module):
                yield from iterate_tbes(lookup)
