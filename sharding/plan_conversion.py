"""Between the plan file and TorchRec's ShardingPlan, both ways and exactly, and what a plan must hold to be used."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.utils import placement
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
)

from sharding.plan_file import PlanFile, PlannedTable
from sharding.planning.errors import PlanError
from sharding.planning.job import Cluster, Job


def to_sharding_plan(plan: PlanFile, device: torch.device) -> ShardingPlan:
    """Return TorchRec's form of a plan, for ranks 0 to `group_size` - 1 whose tables live on `device`'s kind."""
    modules: dict[str, EmbeddingModuleShardingPlan] = {}
    local_size = min(plan.machine.ranks_per_node, plan.machine.group_size)
    for table in plan.tables:
        module = modules.setdefault(table.module, EmbeddingModuleShardingPlan())
        module[table.name] = _parameter_sharding(table, device.type, local_size)
    return ShardingPlan(modules)


def check_plan(plan: PlanFile, job: Job, cluster: Cluster, source: str) -> None:
    """Check that a plan is one for this job on these ranks, and that it places every weight just once.

    Raises:
        PlanError: naming the table or the rank, and the mend.
    """
    _check_machine(plan, cluster, source)
    _check_tables(plan, job, source)
    for table in plan.tables:
        wrong = [rank for rank in table.ranks if rank >= cluster.group_size]
        if wrong:
            raise PlanError(
                f"{source} places table {table.name} on rank {wrong[0]}, but tables are spread over ranks 0 to "
                f"{cluster.group_size - 1}"
            )
        if table.sharding_type == "data_parallel" and cluster.num_groups > 1:
            raise PlanError(
                f"{source}: table {table.name} is data_parallel, but sharding.replicas has groups, which average only "
                "sharded tables; make the plan again with `papilio plan`"
            )
        _check_cover(table, source)


def _check_machine(plan: PlanFile, cluster: Cluster, source: str) -> None:
    planned = (plan.machine.num_nodes, plan.machine.ranks_per_node, plan.machine.num_groups)
    found = (cluster.num_nodes, cluster.ranks_per_node, cluster.num_groups)
    if planned != found:
        raise PlanError(
            f"{source} was made for {_describe_ranks(planned)}, this job has {_describe_ranks(found)}; make the plan "
            f"again with `papilio plan --num-nodes {found[0]} --ranks-per-node {found[1]}`, or launch as it says"
        )
    if plan.machine.device != cluster.hardware.device:
        raise PlanError(
            f"{source} was made for {plan.machine.device} ({plan.machine.hardware}), this job runs on "
            f"{cluster.hardware.device}; make the plan again with --hardware"
        )


def _describe_ranks(found: tuple[int, int, int]) -> str:
    nodes, per_node, groups = found
    return f"{nodes} node(s) of {per_node} rank(s)" + (f" in {groups} groups" if groups > 1 else "")


def _check_tables(plan: PlanFile, job: Job, source: str) -> None:
    planned = {table.name: table for table in plan.tables}
    expected = {table.name: table for table in job.tables}
    if len(planned) != len(plan.tables):
        raise PlanError(f"{source} places a table twice; make the plan again with `papilio plan`")
    missing = [name for name in expected if name not in planned]
    unknown = [name for name in planned if name not in expected]
    if missing or unknown:
        found = [*(f"it does not place {name}" for name in missing[:3]), *(f"it places {n}" for n in unknown[:3])]
        more = len(missing) + len(unknown) - len(found)
        raise PlanError(
            f"{source} is of another model: {'; '.join(found)}{f'; and {more} more' if more else ''}; make the plan "
            "again with `papilio plan`"
        )
    for name, table in expected.items():
        for key in ("module", "num_embeddings", "embedding_dim", "pooling", "precision"):
            if getattr(planned[name], key) != getattr(table, key):
                raise PlanError(
                    f"{source} is of another model: table {name} has {key} {getattr(planned[name], key)} there and "
                    f"{getattr(table, key)} here; make the plan again with `papilio plan`"
                )


def _check_cover(table: PlannedTable, source: str) -> None:
    if table.sharding_type == "data_parallel":
        if table.shards:
            raise PlanError(f"{source}: table {table.name} is data_parallel and has shards; make the plan again")
        return
    if tuple(shard.rank for shard in table.shards) != table.ranks:
        raise PlanError(f"{source}: the ranks of table {table.name} are not those of its shards; make the plan again")
    covered = torch.zeros(1, dtype=torch.int64)
    corners = []
    for shard in table.shards:
        is_inside = (
            shard.row + shard.num_rows <= table.num_embeddings
            and shard.column + shard.num_columns <= table.embedding_dim
        )
        if not is_inside:
            raise PlanError(f"{source}: a shard of table {table.name} reaches beyond the table; make the plan again")
        covered += shard.num_rows * shard.num_columns
        corners.append((shard.row, shard.column, shard.num_rows, shard.num_columns))
    if int(covered) != table.num_embeddings * table.embedding_dim or _overlap(corners):
        raise PlanError(
            f"{source}: the shards of table {table.name} cover {int(covered)} of its "
            f"{table.num_embeddings * table.embedding_dim} weights, not all of them just once; make the plan again"
        )


def _overlap(rectangles: Sequence[tuple[int, int, int, int]]) -> bool:
    """Whether two rectangles (row, column, rows, columns) share a weight."""
    by_column: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row, column, num_rows, num_columns in rectangles:
        by_column.setdefault((column, num_columns), []).append((row, num_rows))
    columns = sorted(by_column)
    if any(first[0] + first[1] > second[0] for first, second in itertools.pairwise(columns)):
        return True
    for rows in by_column.values():
        rows.sort()
        if any(first[0] + first[1] > second[0] for first, second in itertools.pairwise(rows)):
            return True
    return False


def _parameter_sharding(table: PlannedTable, device_type: str, local_size: int) -> ParameterSharding:
    spec = None
    if table.sharding_type != "data_parallel":
        spec = EnumerableShardingSpec(
            [
                ShardMetadata(
                    shard_offsets=[shard.row, shard.column],
                    shard_sizes=[shard.num_rows, shard.num_columns],
                    placement=placement(device_type, shard.rank, local_size),
                )
                for shard in table.shards
            ]
        )
    cache = None
    if table.compute_kernel == EmbeddingComputeKernel.FUSED_UVM_CACHING.value:
        cache = CacheParams(load_factor=table.cache_load_factor)
    return ParameterSharding(
        sharding_type=table.sharding_type,
        compute_kernel=table.compute_kernel,
        ranks=list(table.ranks),
        sharding_spec=spec,
        cache_params=cache,
    )
