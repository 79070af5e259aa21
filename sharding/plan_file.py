"""A sharding plan as versioned JSON: what was decided, readable by people and machines."""

from __future__ import annotations

import json
from typing import Any

from torchrec.distributed.types import ShardingPlan

PLAN_FORMAT_VERSION = 1


def plan_to_dict(plan: ShardingPlan, world_size: int) -> dict[str, Any]:
    """Describe a plan with plain values: per module and table its type, kernel, and each shard's place and size."""
    return {
        "format_version": PLAN_FORMAT_VERSION,
        "world_size": world_size,
        "modules": {
            module: {table: _sharding_to_dict(sharding) for table, sharding in module_plan.items()}
            for module, module_plan in plan.plan.items()
        },
    }


def plan_to_json(plan: ShardingPlan, world_size: int) -> str:
    """Return `plan_to_dict` as indented JSON."""
    return json.dumps(plan_to_dict(plan, world_size), indent=1) + "\n"


def describe_placement(plan: ShardingPlan, world_size: int) -> str:
    """Say in a line per rank how many shards and MiB of fp32 weights it holds."""
    num_shards, num_weights = [0] * world_size, [0] * world_size
    for module_plan in plan.plan.values():
        for sharding in module_plan.values():
            for shard in sharding.sharding_spec.shards:
                num_shards[shard.placement.rank()] += 1
                num_weights[shard.placement.rank()] += shard.shard_sizes[0] * shard.shard_sizes[1]
    return "\n".join(
        f"  rank {rank}: {num_shards[rank]} table shard(s), {4 * num_weights[rank] / 2**20:,.1f} MiB"
        for rank in range(world_size)
    )


def _sharding_to_dict(sharding: Any) -> dict[str, Any]:
    return {
        "sharding_type": sharding.sharding_type,
        "compute_kernel": sharding.compute_kernel,
        "ranks": sharding.ranks,
        "shards": [
            {
                "row": shard.shard_offsets[0],
                "column": shard.shard_offsets[1],
                "num_rows": shard.shard_sizes[0],
                "num_columns": shard.shard_sizes[1],
                "rank": shard.placement.rank(),
            }
            for shard in sharding.sharding_spec.shards
        ],
    }
