"""Private names of TorchRec: the lookups of sharded tables, their mean pooling, and the hooks of DMPCollection.

A sharded module keeps its lookups out of `modules()`, and TorchRec has no public way to ask for its kernels. What
mean pooling divides is in torchrec issue 2362; why we override DMPCollection is told in
sharding/runtime/replicas.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from papilio.sharding.compat.private_name import PrivateName

_BAGS = "torchrec.distributed.embeddingbag.ShardedEmbeddingBagCollection"
_DMP = "torchrec.distributed.model_parallel.DMPCollection"
_GROUPED = "torchrec.distributed.embedding_lookup.GroupedPooledEmbeddingsLookup"
_ON_CPU = "to set up replicated tables on a CPU as DMPCollection.__init__ does on a GPU"
_MEAN = "to divide by the lengths of bags just where rows are cut"
NEEDED = (
    PrivateName(_BAGS, "_lookups", "to find the kernels of this rank", is_assigned=True),
    PrivateName(_GROUPED, "_emb_modules", "to find the kernels of this rank", is_assigned=True),
    PrivateName(_BAGS, "_embedding_bag_configs", _MEAN, is_assigned=True),
    PrivateName(_BAGS, "_pooling_type_to_rs_features", _MEAN, is_assigned=True),
    PrivateName(_BAGS, "_has_mean_pooling_callback", _MEAN, is_assigned=True),
    # Overridden by ReplicatedModelParallel (sharding/runtime/replicas.py).
    PrivateName(
        _DMP,
        "_create_process_groups",
        "to keep its warnings out of the log",
        ("self", "global_rank", "world_size", "local_size", "use_inter_host_allreduce"),
    ),
    PrivateName(
        _DMP,
        "_remap_sharding_plan",
        "to place shards of replicas on a CPU",
        ("self", "plan", "rank", "step", "sharding_group_size", "use_inter_host_allreduce"),
    ),
    PrivateName(_DMP, "_cache_sync_tensors", "to average every kind of optimizer state", ("self", "contexts")),
    # Called or assigned by it.
    PrivateName(_DMP, "_group_sharded_modules", _ON_CPU, ("self", "contexts")),
    *(
        PrivateName(_DMP, name, _ON_CPU, is_assigned=True)
        for name in (
            *("_ctxs", "_custom_all_reduce", "_default_ctx", "_device", "_global_rank", "_pg", "_sharder_map"),
            "_submodule_ctxs",
        )
    ),
    PrivateName(_DMP, "_sharded_relay_state", _ON_CPU, is_assigned=True, since="1.8.0"),
    PrivateName(_DMP, "_use_sharded_relay", _ON_CPU, is_assigned=True, since="1.8.0"),
)


def lookups_of(bags: ShardedEmbeddingBagCollection) -> list[nn.Module]:
    """Return this rank's lookups, one for each way of sharding; those of data_parallel tables are wrapped in a DDP."""
    return list(bags._lookups)


def embedding_groups(lookup: nn.Module) -> list[Any]:
    """Return the groups of tables of a lookup, each with its kernel (`emb_module`) and its tables (`config`).

    None for a lookup in a DDP: its kernels have no fused optimizer.
    """
    if isinstance(lookup, nn.parallel.DistributedDataParallel):
        return []
    return list(lookup._emb_modules)  # type: ignore[arg-type]


def tables_of(bags: ShardedEmbeddingBagCollection) -> list[EmbeddingBagConfig]:
    """Return the tables of a sharded module."""
    return list(bags._embedding_bag_configs)


def divide_by_bag_lengths(bags: ShardedEmbeddingBagCollection, divided: list[str], kept: list[str]) -> None:
    """Let TorchRec divide the pooled outputs of the features `divided`, and not those of `kept`.

    `__init__` assigns both names; to read them before they are written turns a rename into an error.
    """
    is_divided_already: bool = bags._has_mean_pooling_callback
    bags._pooling_type_to_rs_features.update({PoolingType.MEAN.value: divided, PoolingType.SUM.value: kept})
    bags._has_mean_pooling_callback = is_divided_already or bool(divided)
