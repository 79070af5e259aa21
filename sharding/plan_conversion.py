"""Between the plan file and TorchRec's ShardingPlan, both ways and exactly, and what a plan must hold to be used."""

from __future__ import annotations

import torch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.utils import placement
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
)

from papilio.sharding.compat.torch_internals import EnumerableShardingSpec, ShardMetadata
from papilio.sharding.plan_file import PlanFile, PlannedTable, shown
from papilio.sharding.planner.errors import PlanError
from papilio.sharding.planner.geometry import check_geometry
from papilio.sharding.planner.job import Cluster, Job


def to_sharding_plan(plan: PlanFile, device: torch.device) -> ShardingPlan:
    """Return TorchRec's form of a plan, for ranks 0 to `group_size` - 1 whose tables live on `device`'s kind."""
    modules: dict[str, EmbeddingModuleShardingPlan] = {}
    local_size = min(plan.machine.ranks_per_node, plan.machine.group_size)
    for table in plan.tables:
        module = modules.setdefault(table.module, EmbeddingModuleShardingPlan())
        module[table.name] = _parameter_sharding(table, device.type, local_size)
    return ShardingPlan(modules)


def check_plan(plan: PlanFile, job: Job, cluster: Cluster, source: str) -> None:
    """Check that a plan is one for this job on these ranks, and that training would follow it to the letter.

    Raises:
        PlanError: naming the table or the rank, and the fix.
    """
    _check_machine(plan, cluster, source)
    _check_tables(plan, job, source)
    # What cut columns mean to training, and what fits into memory, is the optimizer's.
    if plan.sparse_optimizer != job.sparse_optimizer:
        raise PlanError(
            f"{source} was made for optimizer.sparse.name = {shown(plan.sparse_optimizer)}, this job trains with "
            f"{job.sparse_optimizer}; make the plan again with `papilio plan`"
        )
    for table in plan.tables:
        if table.sharding_type == "data_parallel" and cluster.num_groups > 1:
            raise PlanError(
                f"{source}: table {table.name} is data_parallel, but sharding.replicas has groups, which average only "
                "sharded tables; make the plan again with `papilio plan`"
            )
        check_geometry(
            table,
            group_size=cluster.group_size,
            ranks_per_host=cluster.group_ranks_per_node,
            device=cluster.hardware.device,
            source=source,
        )


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
    if [rank.rank for rank in plan.ranks] != list(range(cluster.group_size)):
        raise PlanError(
            f"{source} does not list ranks 0 to {cluster.group_size - 1}, each once and in order; make the plan again "
            "with `papilio plan`"
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
        found = [
            *(f"it does not place {name}" for name in missing[:3]),
            *(f"it places {shown(n)}" for n in unknown[:3]),
        ]
        more = len(missing) + len(unknown) - len(found)
        raise PlanError(
            f"{source} is of another model: {'; '.join(found)}{f'; and {more} more' if more else ''}; make the plan "
            "again with `papilio plan`"
        )
    for name, table in expected.items():
        for key in ("module", "num_embeddings", "embedding_dim", "pooling", "precision"):
            if getattr(planned[name], key) != getattr(table, key):
                raise PlanError(
                    f"{source} is of another model: table {name} has {key} {shown(getattr(planned[name], key))} there "
                    f"and {getattr(table, key)} here; make the plan again with `papilio plan`"
                )


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
