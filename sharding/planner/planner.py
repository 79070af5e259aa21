"""From a job and a cluster to a plan: list the options, estimate each, search, and write down what was decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from papilio.sharding.config import ShardingConfig
from papilio.sharding.plan_file import (
    Phases,
    PlanFile,
    PlannedOn,
    PlannedRank,
    PlannedTable,
    ShardPlace,
    StepPrediction,
)
from papilio.sharding.planner.constraints import Item, resolve_constraints
from papilio.sharding.planner.cost import PHASES, option_seconds, predict_step, shard_seconds
from papilio.sharding.planner.geometry import cut_table
from papilio.sharding.planner.job import Cluster, Job
from papilio.sharding.planner.memory import HOST, KINDS, device_bytes, memory_use, rank_bytes, shard_bytes
from papilio.sharding.planner.notes import make_notes
from papilio.sharding.planner.options import Option, Span
from papilio.sharding.planner.placement import PlacementCandidate
from papilio.sharding.planner.search import Problem, SearchFailure, Solution, search

GIB = 1 << 30
# Plans whose predicted steps differ by less are not told apart: predictions are off by 8 % on average on a calibrated
# machine (benchmarks/RESULTS.md), and each shard more is one more thing that they may be wrong about.
INDISTINGUISHABLE = 0.10


@dataclass(frozen=True)
class Budget:
    """Bytes of one rank: `usable` of its device by tables and step together, `base` of them whatever the plan is."""

    capacity: int
    usable: float
    base: float
    host_usable: float

    @property
    def for_tables(self) -> float:
        """What is left for shards and what comes with them."""
        return self.usable - self.base


@dataclass(frozen=True)
class Planning:
    """A job with every choice estimated: what a search works on, and what explanations go back to."""

    job: Job
    cluster: Cluster
    config: ShardingConfig
    budget: Budget
    items: list[Item]
    problem: Problem
    costs: dict[Option, NDArray[np.float64]] = field(repr=False)


def prepare(job: Job, cluster: Cluster, config: ShardingConfig, memory_bytes: int | None = None) -> Planning:
    """List and estimate all options.

    Args:
        job: what is to be trained.
        cluster: where.
        config: what is allowed and asked for.
        memory_bytes: memory of a rank's device, where it is known better than from the hardware's profile.

    Raises:
        PlanError: a constraint matches no table or cannot be satisfied.
    """
    items = resolve_constraints(config, job, cluster)
    costs: dict[Option, NDArray[np.float64]] = {}
    choices = [[_choice_of(options, job, cluster, costs) for options in item.choices] for item in items]
    budget = _budget(job, cluster, config, memory_bytes)
    problem = Problem(
        choices=choices,
        allowed=[_mask(item.ranks, cluster.group_size) for item in items],
        num_ranks=cluster.group_size,
        ranks_per_host=cluster.group_ranks_per_node,
        device_limit_bytes=budget.for_tables,
        host_limit_bytes=budget.host_usable,
    )
    return Planning(job, cluster, config, budget, items, problem, costs)


def solve(planning: Planning) -> Solution | SearchFailure:
    """Search for the best placement: among all options, and again with one sharding type preferred at a time.

    Each type in use brings collectives and kernels of its own to every step. A search that goes table by table does
    not see that; the prediction of the whole step does. Of the solutions that it does not tell apart from the fastest,
    the one with the fewest shards is taken.
    """
    if planning.budget.for_tables < 0:
        return SearchFailure(tuple(range(len(planning.items))))
    found = search(planning.problem)
    solutions = [found] if isinstance(found, Solution) else []
    for sharding_type in dict.fromkeys(choice[0].sharding_type for item in planning.items for choice in item.choices):
        kept = [_picks_of_type(item, sharding_type) for item in planning.items]
        if all(len(picks) == len(item.choices) for picks, item in zip(kept, planning.items, strict=True)):
            continue
        problem = replace(
            planning.problem,
            choices=[
                [choices[p] for p in picks] for choices, picks in zip(planning.problem.choices, kept, strict=True)
            ],
        )
        solution = search(problem)
        if isinstance(solution, Solution):
            picks = tuple(picks[pick] for picks, pick in zip(kept, solution.picks, strict=True))
            solutions.append(replace(solution, picks=picks))
    if not solutions:
        return found
    seconds = [predict(planning, solution).total_s for solution in solutions]
    near = [
        (sum(len(ranks) for ranks in solution.ranks), step_s, index)
        for index, (solution, step_s) in enumerate(zip(solutions, seconds, strict=True))
        if step_s <= min(seconds) * (1 + INDISTINGUISHABLE)
    ]
    return solutions[min(near)[-1]]


def _picks_of_type(item: Item, sharding_type: str) -> list[int]:
    """The item's choices of this sharding type, or all where it has none."""
    picks = [pick for pick, choice in enumerate(item.choices) if choice[0].sharding_type == sharding_type]
    return picks or list(range(len(item.choices)))


def chosen_options(planning: Planning, solution: Solution) -> dict[str, tuple[Option, NDArray[np.int64]]]:
    """Return, by table and in the job's order, the option chosen and the ranks of its shards."""
    chosen: dict[str, tuple[Option, NDArray[np.int64]]] = {}
    for item, pick, ranks in zip(planning.items, solution.picks, solution.ranks, strict=True):
        chosen |= {option.table.name: (option, ranks) for option in item.choices[pick]}
    return {table.name: chosen[table.name] for table in planning.job.tables}


def predict(planning: Planning, solution: Solution) -> StepPrediction:
    """Predict the step of a solution."""
    chosen = chosen_options(planning, solution)
    rank_phases = _rank_phases(planning, chosen.values())
    return _predict(planning, rank_phases, [option for option, _ in chosen.values()])


def write_plan(planning: Planning, solution: Solution, *, recipe: str, papilio_version: str) -> PlanFile:
    """Write a solution down with all that was predicted of it."""
    job, cluster = planning.job, planning.cluster
    chosen = chosen_options(planning, solution)
    phases_WP = _rank_phases(planning, chosen.values())
    memory_WK = np.tile(rank_bytes(job, cluster), (cluster.group_size, 1))
    num_shards = np.zeros(cluster.group_size, np.int64)
    for option, ranks in chosen.values():
        memory_WK[ranks] += shard_bytes(option, job, cluster)
        num_shards[ranks] += 1
    step = _predict(planning, phases_WP, [option for option, _ in chosen.values()])
    return PlanFile(
        papilio_version=papilio_version,
        recipe=recipe,
        machine=_machine(planning),
        global_batch_size=job.global_batch_size,
        sparse_optimizer=job.sparse_optimizer,
        precision=job.precision,
        tables=tuple(_planned_table(planning, option, ranks) for option, ranks in chosen.values()),
        ranks=tuple(
            PlannedRank(
                rank=rank,
                node=rank // cluster.ranks_per_node,
                num_shards=int(num_shards[rank]),
                memory=memory_use(memory_WK[rank]),
                phases=_phases(phases_WP[rank]),
            )
            for rank in range(cluster.group_size)
        ),
        step=step,
        notes=make_notes(job, cluster, [option for option, _ in chosen.values()]),
    )


def _predict(planning: Planning, rank_phases_WP: NDArray[np.float64], options: Sequence[Option]) -> StepPrediction:
    replicas = planning.config.replicas
    every = None if replicas.independent_tables else replicas.sync_every_steps
    return predict_step(rank_phases_WP, options, planning.job, planning.cluster, sync_every_steps=every)


def places_of(option: Option, ranks: Sequence[int]) -> tuple[ShardPlace, ...]:
    """Return the rectangle of each shard, column block by column block, as TorchRec orders them."""
    if option.sharding_type == "data_parallel":
        return ()
    return cut_table(
        option.table.num_embeddings, option.table.embedding_dim, option.num_row_shards, option.num_column_shards, ranks
    )


def _choice_of(
    options: Sequence[Option], job: Job, cluster: Cluster, costs: dict[Option, NDArray[np.float64]]
) -> PlacementCandidate:
    """Reckon options that are placed as one."""
    memory = np.zeros(len(KINDS))
    seconds, everywhere = 0.0, 0.0
    for option in options:
        costs[option] = shard_seconds(option, job, cluster)
        seconds += float(costs[option].sum())
        everywhere += option_seconds(option, job, cluster)
        memory += shard_bytes(option, job, cluster)
    first = options[0]
    blocks = first.num_column_shards
    num_shards = {
        Span.EACH_RANK: cluster.group_size,
        Span.HOST: blocks * cluster.group_ranks_per_node,
    }.get(first.span, blocks)
    return PlacementCandidate(
        first.span, blocks, seconds, device_bytes(memory), float(memory[HOST]), num_shards, everywhere
    )


def _budget(job: Job, cluster: Cluster, config: ShardingConfig, memory_bytes: int | None) -> Budget:
    capacity = memory_bytes or cluster.hardware.device_memory_bytes(cluster.ranks_per_node)
    if config.memory_per_rank_gib is not None:
        capacity = int(config.memory_per_rank_gib * GIB)
    share = 1 - config.reserve_fraction
    # Groups on one host share its memory.
    groups_per_host = max(1, cluster.ranks_per_node // cluster.group_size)
    base = rank_bytes(job, cluster)
    return Budget(
        capacity, share * capacity, device_bytes(base), share * cluster.hardware.host_memory.si / groups_per_host
    )


def _mask(ranks: tuple[int, ...] | None, num_ranks: int) -> NDArray[np.bool_] | None:
    if ranks is None:
        return None
    mask = np.zeros(num_ranks, np.bool_)
    mask[list(ranks)] = True
    return mask


def _rank_phases(planning: Planning, chosen: object) -> NDArray[np.float64]:
    """Sum the shards' phases by rank, [W, 5]."""
    phases_WP = np.zeros((planning.cluster.group_size, len(PHASES)))
    for option, ranks in chosen:  # type: ignore[attr-defined]
        phases_WP[ranks] += planning.costs[option]
    return phases_WP


def _planned_table(planning: Planning, option: Option, ranks: NDArray[np.int64]) -> PlannedTable:
    table, job = option.table, planning.job
    copies = len(ranks) if option.span is Span.EACH_RANK and option.num_row_shards == 1 else 1
    per_row_state = option.shard_optimizer_bytes(job.sparse_optimizer) / option.shard_rows
    return PlannedTable(
        name=table.name,
        module=table.module,
        feature=table.feature,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        pooling=table.pooling,
        pooling_factor=table.pooling_factor,
        precision=table.precision,
        sharding_type=option.sharding_type,
        compute_kernel=option.kernel,
        cache_load_factor=option.cache_load_factor,
        ranks=tuple(int(rank) for rank in ranks),
        shards=places_of(option, [int(rank) for rank in ranks]),
        weights_bytes=copies * table.weights_bytes,
        optimizer_bytes=copies * round(per_row_state * table.num_embeddings * option.num_column_shards),
        phases=_phases(planning.costs[option]),
    )


def _phases(row: NDArray[np.float64]) -> Phases:
    return Phases(**dict(zip(PHASES, (float(value) for value in row), strict=True)))


def _machine(planning: Planning) -> PlannedOn:
    cluster, budget = planning.cluster, planning.budget
    return PlannedOn(
        hardware=cluster.hardware.name,
        description=cluster.hardware.description,
        device=cluster.hardware.device,
        num_nodes=cluster.num_nodes,
        ranks_per_node=cluster.ranks_per_node,
        num_groups=cluster.num_groups,
        device_memory_bytes=budget.capacity,
        usable_memory_bytes=int(budget.usable),
        host_memory_bytes=int(cluster.hardware.host_memory.si),
    )
