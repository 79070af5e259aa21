"""Why a table is where it is: every option for it, what the whole step would be with that option, and what is wrong."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from papilio.sharding.config import KernelName, ShardingConfig, TableConstraint
from papilio.sharding.patterns import matches
from papilio.sharding.plan_file import StepPrediction
from papilio.sharding.planner.errors import PlanError
from papilio.sharding.planner.job import SPARSE_STATE_BYTES
from papilio.sharding.planner.options import Option
from papilio.sharding.planner.planner import GIB, INDISTINGUISHABLE, Planning, chosen_options, predict, prepare
from papilio.sharding.planner.remediation import ALL_TYPES
from papilio.sharding.planner.search import Solution, replace_one

# Steps that differ by less are called equal: the prediction is not that good.
EQUAL = 1e-3


@dataclass(frozen=True)
class OptionReport:
    """One option for a table.

    Attributes:
        option: what it is.
        is_chosen: whether it is the plan's.
        shard_bytes: device memory that its largest shard takes on a rank, with buffers.
        shard_ms: milliseconds that a shard costs its rank in a step.
        step_ms: the predicted step with this option and all other tables free to move; None where it does not fit.
        reason: why it was chosen, or was not.
    """

    option: Option
    is_chosen: bool
    shard_bytes: float
    shard_ms: float
    step_ms: float | None
    reason: str


def explain_table(
    planning: Planning, solution: Solution, table: str, memory_bytes: int | None = None
) -> list[OptionReport]:
    """Reckon every option of one table, those that the recipe does not allow too; the chosen one first, then by step.

    Raises:
        PlanError: there is no such table.
    """
    names = [known.name for known in planning.job.tables]
    if table not in names:
        nearest = difflib.get_close_matches(table, names, n=1, cutoff=0.4)
        fix = f"did you mean {nearest[0]}?" if nearest else f"tables: {', '.join(names[:8])}, ..."
        raise PlanError(f"--explain {table}: there is no such table; {fix}")
    chosen, _ = chosen_options(planning, solution)[table]
    wide = prepare(planning.job, planning.cluster, _allow_all(planning, table), memory_bytes)
    item = next(i for i, found in enumerate(wide.items) if found.tables[0].name == table)
    start = _same_solution(planning, wide, solution)
    best = predict(planning, solution)
    reports = []
    for pick, (option,) in enumerate(wide.items[item].choices):
        choice = wide.problem.choices[item][pick]
        found = solution if option == chosen else replace_one(wide.problem, start, item, pick)
        step = best if option == chosen else predict(wide, found) if found is not None else None
        is_allowed = any(option in allowed for old in planning.items for allowed in old.choices)
        reports.append(
            OptionReport(
                option=option,
                is_chosen=option == chosen,
                shard_bytes=choice.device_bytes,
                shard_ms=choice.seconds * 1e3,
                step_ms=None if step is None else step.total_s * 1e3,
                reason=_reason(option, option == chosen, is_allowed, step, best, choice.device_bytes, planning),
            )
        )
    return sorted(reports, key=lambda report: (not report.is_chosen, report.step_ms is None, report.step_ms or 0.0))


def _allow_all(planning: Planning, table: str) -> ShardingConfig:
    """The config with every type and kernel open to one table, which may also leave those it is kept together with."""
    kernels: tuple[KernelName, ...] = ("fused", "fused_uvm", "fused_uvm_caching")
    types = ("data_parallel", *ALL_TYPES)
    own = TableConstraint(tables=(table,), types=types, kernels=kernels)
    rest = [
        constraint.model_copy(update={"keep_together": False})
        if any(matches(table, pattern) for pattern in constraint.tables)
        else constraint
        for constraint in planning.config.constraints
    ]
    return planning.config.model_copy(update={"constraints": (*rest, own)})


def _same_solution(planning: Planning, wide: Planning, solution: Solution) -> Solution:
    """Express a solution in the item and choice numbers of another planning of the same tables."""
    chosen = chosen_options(planning, solution)
    picks, ranks = [], []
    for item in wide.items:
        option, where = chosen[item.tables[0].name]
        picks.append(next((p for p, choice in enumerate(item.choices) if choice[0] == option), 0))
        ranks.append(where)
    return replace(solution, picks=tuple(picks), ranks=tuple(ranks))


def _reason(
    option: Option,
    is_chosen: bool,
    is_allowed: bool,
    step: StepPrediction | None,
    best: StepPrediction,
    shard_bytes: float,
    planning: Planning,
) -> str:
    if is_chosen:
        return "chosen"
    prefix = "" if is_allowed else f"{_why_not_allowed(option, planning)}; "
    if step is None:
        free = planning.budget.for_tables / GIB
        return f"{prefix}does not fit: {shard_bytes / GIB:,.2f} GiB on a rank, {free:,.2f} GiB free for all tables"
    change = step.total_s / best.total_s - 1
    if abs(change) < EQUAL:
        return f"{prefix}as fast, within {EQUAL:.1%}"
    if change < 0:
        why = "; the search missed it" if is_allowed else ""
        if is_allowed and step.total_s * (1 + INDISTINGUISHABLE) >= best.total_s:
            why = f", which predictions do not tell apart below {INDISTINGUISHABLE:.0%}; fewer shards were preferred"
        return f"{prefix}{-change:.1%} faster by this estimating{why}"
    part, seconds = _largest_increase(step, best)
    slower = f"{change:.1%} slower" if change < 1 else f"{1 + change:.1f} times the step"
    return f"{prefix}{slower}, most of it {part} (+{seconds * 1e3:,.2f} ms)"


def _why_not_allowed(option: Option, planning: Planning) -> str:
    optimizer = planning.job.sparse_optimizer
    if option.num_column_shards > 1 and SPARSE_STATE_BYTES[optimizer][1]:
        return f"only where a constraint of the table names it, since {optimizer} has one number a row"
    return "not allowed by the recipe"


def _largest_increase(step: StepPrediction, best: StepPrediction) -> tuple[str, float]:
    parts = {
        "ids to the shards": step.phases.input_dist_s - best.phases.input_dist_s,
        "lookup": step.phases.lookup_s - best.phases.lookup_s,
        "pooled embeddings to the samples": step.phases.output_dist_s - best.phases.output_dist_s,
        "gradients back": step.phases.gradient_dist_s - best.phases.gradient_dist_s,
        "update": step.phases.update_s - best.phases.update_s,
        "overhead of one more kind of sharding or shard": step.overhead_s - best.overhead_s,
        "less of it hidden": best.hidden_s - step.hidden_s,
    }
    return max(parts.items(), key=lambda part: part[1])
