"""The sharder of embedding bags: TorchRec's own, with what it refuses on a CPU only by a list allowed again."""

from __future__ import annotations

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import ShardingType

MODEL_PARALLEL_TYPES = [
    ShardingType.TABLE_WISE.value,
    ShardingType.ROW_WISE.value,
    ShardingType.COLUMN_WISE.value,
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
]


class BagSharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]  # torchrec has no type information
    """Shards an `EmbeddingBagCollection` in any model-parallel way, on any device.

    TorchRec leaves row-wise types out for a CPU (torchrec issues 1252 and 3031), though its gloo collectives and
    FBGEMM's CPU kernels compute them rightly (tests/sharding/test_equivalence.py).
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return what the planner may consider; data_parallel is not there, it would drop the fused optimizer."""
        return list(MODEL_PARALLEL_TYPES)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Return the fused kernels only, so that every table keeps its fused optimizer."""
        kernels = super().compute_kernels(sharding_type, compute_device_type)
        fused = {kernel.value for kernel in EmbeddingComputeKernel if kernel.value.startswith("fused")}
        return [kernel for kernel in kernels if kernel in fused]
