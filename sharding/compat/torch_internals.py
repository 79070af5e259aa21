"""Private names of torch that sharding needs: the types in which TorchRec takes and gives shards.

TorchRec's public API is in terms of `torch.distributed._shard`: plans hold `ShardMetadata` in an
`EnumerableShardingSpec`, state dicts hold `ShardedTensor`. Torch has no public name for any of them.
"""

from __future__ import annotations

from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torch.distributed.remote_device import _remote_device

from papilio.sharding.compat.private_name import PrivateName

__all__ = ["NEEDED", "EnumerableShardingSpec", "ShardMetadata", "ShardedTensor", "cpu_of_rank"]

_SPEC = "torch.distributed._shard.sharding_spec"
NEEDED = (
    PrivateName(_SPEC, "EnumerableShardingSpec", "to give TorchRec the shards of a plan", ("shards",)),
    PrivateName(
        _SPEC, "ShardMetadata", "to give TorchRec the shards of a plan", ("shard_offsets", "shard_sizes", "placement")
    ),
    PrivateName("torch.distributed._shard.sharded_tensor", "ShardedTensor", "to find the shards to initialize"),
    PrivateName(
        "torch.distributed._shard.sharded_tensor.ShardedTensor",
        "local_shards",
        "to find the shards to initialize",
        ("self",),
    ),
    PrivateName("torch.distributed.remote_device", "_remote_device", "to place shards of replicas on a CPU"),
    PrivateName(
        "torch.distributed.remote_device._remote_device",
        "__init__",
        "to place shards of replicas on a CPU",
        ("self", "remote_device"),
    ),
    PrivateName(
        "torch.distributed.remote_device._remote_device", "rank", "to place shards of replicas on a CPU", ("self",)
    ),
)


def cpu_of_rank(rank: int) -> _remote_device:
    """Return the placement of a shard on a rank's CPU, in the form of `ShardMetadata.placement`.

    TorchRec's DMPCollection writes cpu:<index>, which gloo does not know.
    """
    return _remote_device(f"rank:{rank}/cpu")
