"""Plans written by hand: the shards that each sharding type means, without any planner."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec import EmbeddingBagCollection
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan

SHARDING_TYPES = (
    "data_parallel",
    "table_wise",
    "row_wise",
    "column_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
)
NUM_COLUMN_BLOCKS = {"column_wise": 2, "table_column_wise": 2, "grid_shard": 2}


def make_plan(model: nn.Module, types: Mapping[str, str], world_size: int, local_world_size: int) -> ShardingPlan:
    """Shard each table of the model in its type (by table name); tables begin on different ranks or hosts."""
    modules = {}
    for path, module in model.named_modules():
        if isinstance(module, EmbeddingBagCollection):
            modules[path] = EmbeddingModuleShardingPlan()
            for index, table in enumerate(module.embedding_bag_configs()):
                shards = _shards(types[table.name], index, table, world_size, local_world_size)
                modules[path][table.name] = _parameter_sharding(types[table.name], shards, world_size)
    return ShardingPlan(modules)


def _shards(sharding_type, index, table, world_size, local_world_size):
    """Return (rank, row, column, rows, columns) of each shard."""
    num_hosts = world_size // local_world_size
    # The ranks of the hosts that get the two column blocks, or the first of them everything.
    hosts = [
        [host * local_world_size + rank for rank in range(local_world_size)]
        for host in [(index + block) % num_hosts for block in range(2)]
    ]
    rows, columns = (0, table.num_embeddings), (0, table.embedding_dim)
    halves = [(0, columns[1] // 2), (columns[1] // 2, columns[1] - columns[1] // 2)]
    index = index % world_size
    by_type = {
        "data_parallel": lambda: [],
        "table_wise": lambda: [_shard(index, rows, columns)],
        "row_wise": lambda: _row_shards(range(world_size), rows[1], columns),
        "column_wise": lambda: [_shard((index + i) % world_size, rows, half) for i, half in enumerate(halves)],
        "table_row_wise": lambda: _row_shards(hosts[0], rows[1], columns),
        "table_column_wise": lambda: [
            _shard(hosts[0][i % local_world_size], rows, half) for i, half in enumerate(halves)
        ],
        "grid_shard": lambda: [s for i, half in enumerate(halves) for s in _row_shards(hosts[i], rows[1], half)],
    }
    return by_type[sharding_type]()


def _shard(rank, rows, columns):
    return rank, rows[0], columns[0], rows[1], columns[1]


def _row_shards(ranks, num_rows, columns):
    """Blocks of ceil(rows / ranks) rows, the last ones smaller or empty: TorchRec's rule."""
    block = -(-num_rows // len(ranks))
    starts = [min(i * block, num_rows) for i in range(len(ranks) + 1)]
    return [_shard(rank, (starts[i], starts[i + 1] - starts[i]), columns) for i, rank in enumerate(ranks)]


def _parameter_sharding(sharding_type, shards, world_size):
    if sharding_type == "data_parallel":
        return ParameterSharding(sharding_type, "dense", ranks=list(range(world_size)))
    metadata = [
        ShardMetadata(shard_offsets=[row, column], shard_sizes=[rows, columns], placement=f"rank:{rank}/cpu")
        for rank, row, column, rows, columns in shards
    ]
    ranks = [rank for rank, *_ in shards]
    return ParameterSharding(sharding_type, "fused", ranks=ranks, sharding_spec=EnumerableShardingSpec(metadata))
