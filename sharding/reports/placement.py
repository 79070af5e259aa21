"""What each rank holds, in a few lines: for the head of a training job's output."""

from __future__ import annotations

from papilio.sharding.plan_file import PlanFile
from papilio.sharding.planner.notes import row_state_note

MIB = 1 << 20
# Ranks listed one by one; of more, only the extremes.
MAX_LISTED = 8


def describe_placement(plan: PlanFile) -> str:
    """Say what the ranks hold, and which tables are not trained as whole tables would be."""
    cut = [table.name for table in plan.tables if len({shard.column for shard in table.shards}) > 1]
    warnings = [f"warning: {note}" for note in row_state_note(cut, plan.sparse_optimizer)]
    return "\n".join([_describe_ranks(plan), *warnings])


def _describe_ranks(plan: PlanFile) -> str:
    """Say how many shards and MiB of tables the ranks hold, a line each, or the extremes of many."""
    held = [(rank.memory.weights_bytes + rank.memory.cache_bytes + rank.memory.host_bytes) / MIB for rank in plan.ranks]
    groups = f", in each of {plan.machine.num_groups} groups" if plan.machine.num_groups > 1 else ""
    if len(plan.ranks) <= MAX_LISTED:
        return "\n".join(
            f"  rank {rank.rank}: {rank.num_shards} table shard(s), {mib:,.1f} MiB{groups}"
            for rank, mib in zip(plan.ranks, held, strict=True)
        )
    shards = [rank.num_shards for rank in plan.ranks]
    return (
        f"  {len(plan.ranks)} ranks: {min(shards)} to {max(shards)} table shards, {min(held):,.1f} to {max(held):,.1f} "
        f"MiB each{groups}"
    )
