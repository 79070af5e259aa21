"""A plan, or an error that says what is short and what would help."""

from __future__ import annotations

from papilio.sharding.config import ShardingConfig
from papilio.sharding.plan_file import PlanFile
from papilio.sharding.planner.errors import PlanError
from papilio.sharding.planner.job import Cluster, Job
from papilio.sharding.planner.planner import GIB, Planning, prepare, solve, write_plan
from papilio.sharding.planner.remediation import find_remediations
from papilio.sharding.planner.search import SearchFailure


def make_plan(
    job: Job,
    cluster: Cluster,
    config: ShardingConfig,
    *,
    recipe: str,
    papilio_version: str,
    memory_bytes: int | None = None,
) -> PlanFile:
    """Plan a job; nothing is allocated, and no rank but this one is needed.

    Args:
        job: what is to be trained.
        cluster: where.
        config: what is allowed and asked for.
        recipe: name of the run, for the plan's head.
        papilio_version: for the plan's head.
        memory_bytes: memory of a rank's device, where it is known better than from the hardware's profile.

    Raises:
        PlanError: a constraint cannot be satisfied, or the job does not fit; the message then has the remediation.
    """
    planning = prepare(job, cluster, config, memory_bytes)
    found = solve(planning)
    if isinstance(found, SearchFailure):
        raise PlanError(describe_failure(planning, found, memory_bytes))
    return write_plan(planning, found, recipe=recipe, papilio_version=papilio_version)


def describe_failure(planning: Planning, failure: SearchFailure, memory_bytes: int | None) -> str:
    """Say what is short, in figures, and list the remediation, the fastest first."""
    lines = [_shortage(planning, failure)]
    remediations = find_remediations(planning, memory_bytes)
    if not remediations:
        lines.append("No single change helps, nor two together; use smaller tables (hashing, a higher frequency cut).")
    else:
        lines.append("It fits, each of these planned and checked, the fastest first:")
        for remediation in remediations:
            step = f"{remediation.step_s * 1e3:,.1f} ms a step, {remediation.samples_per_s:,.0f} samples/s"
            lines += [f"  {remediation.words}: {step}", f"      {remediation.setting}"]
    return "\n".join(lines)


def _shortage(planning: Planning, failure: SearchFailure) -> str:
    budget, cluster = planning.budget, planning.cluster
    kept = f"{budget.capacity / GIB:,.1f} GiB a rank, {planning.config.reserve_fraction:.0%} of it kept free"
    if budget.for_tables < 0:
        return (
            f"the job does not fit {cluster.hardware.name}: before any table a rank needs {budget.base / GIB:,.1f} GiB "
            f"for the dense part, activations, input and framework, and may use {budget.usable / GIB:,.1f} ({kept})"
        )
    least = sum(
        min(choice.device_bytes * choice.num_shards for choice in choices) for choices in planning.problem.choices
    )
    item = failure.items[0]
    names = ", ".join(table.name for table in planning.items[item].tables)
    smallest = min(choice.device_bytes for choice in planning.problem.choices[item])
    allowed = ", ".join(dict.fromkeys(choice[0].sharding_type for choice in planning.items[item].choices))
    return (
        f"the tables do not fit {cluster.group_size} rank(s) of {cluster.hardware.name}: they need at least "
        f"{least / GIB:,.1f} GiB with the step's buffers, and {cluster.group_size * budget.for_tables / GIB:,.1f} GiB "
        f"are free for them ({kept}). No room for {len(failure.items)} of {len(planning.items)}, first for {names}: "
        f"{smallest / GIB:,.2f} GiB on a rank at the least ({allowed}), where {budget.for_tables / GIB:,.2f} are free "
        "before any table is placed"
    )
