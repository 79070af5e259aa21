"""The sharder of embedding bags: TorchRec's own, with what it refuses on a CPU only by a list allowed again."""

from __future__ import annotations

import torch
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType

from papilio.sharding.runtime.empty_shards import fix_empty_shards
from papilio.sharding.runtime.mean_pooling import fix_mean_pooling

SHARDING_TYPES = (
    ShardingType.DATA_PARALLEL,
    ShardingType.TABLE_WISE,
    ShardingType.ROW_WISE,
    ShardingType.COLUMN_WISE,
    ShardingType.TABLE_ROW_WISE,
    ShardingType.TABLE_COLUMN_WISE,
    ShardingType.GRID_SHARD,
)
GPU_KERNELS = (
    EmbeddingComputeKernel.FUSED,
    EmbeddingComputeKernel.FUSED_UVM,
    EmbeddingComputeKernel.FUSED_UVM_CACHING,
)


class BagSharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]  # torchrec has no type information
    """Shards an `EmbeddingBagCollection` in any way, on any device.

    TorchRec leaves row-wise types out for a CPU (torchrec issues 1252 and 3031), though its gloo collectives and
    FBGEMM's CPU kernels compute them rightly (tests/sharding/runtime/test_equivalence.py), once their gaps are fixed
    (mean_pooling.py, empty_shards.py). What data_parallel tables need besides is an optimizer that
    steps (`make_sparse_optimizer` in trainer/optimizers.py).
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return the types that may be used; all, on every device."""
        return [sharding_type.value for sharding_type in SHARDING_TYPES]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Return the kernels that may be used: dense for data_parallel; else fused, and on a GPU through UVM."""
        if sharding_type == ShardingType.DATA_PARALLEL.value:
            return [EmbeddingComputeKernel.DENSE.value]
        return [kernel.value for kernel in (GPU_KERNELS if compute_device_type == "cuda" else GPU_KERNELS[:1])]

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingBagCollection:
        """Shard as planned. Collective."""
        sharded = super().shard(module, params, env, device, module_fqn)
        fix_mean_pooling(sharded)
        fix_empty_shards(sharded)
        return sharded
