"""When a job does not fit: changes that make it fit, each found by planning anew with that change."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import get_args

from papilio.sharding.config import ShardingConfig, ShardingTypeName, TableConstraint
from papilio.sharding.planner.errors import PlanError
from papilio.sharding.planner.job import SPARSE_STATE_BYTES, Cluster, Job
from papilio.sharding.planner.planner import Planning, chosen_options, predict, prepare, solve
from papilio.sharding.planner.search import Solution

ALL_TYPES: tuple[ShardingTypeName, ...] = tuple(name for name in get_args(ShardingTypeName) if name != "data_parallel")
MAX_NODES = 4_096
MIN_BATCH_PER_RANK = 16
# Names in a sentence before it says "and so many more".
MAX_NAMES = 4
# How often the types of tables that still find no place are relaxed, too.
MAX_ROUNDS = 8


@dataclass(frozen=True)
class Remediation:
    """A change with which the job fits: in words, as settings, and what the step then is predicted to take."""

    words: str
    setting: str
    step_s: float
    samples_per_s: float


@dataclass(frozen=True)
class _Case:
    """What is planned, and the changes that led to it."""

    job: Job
    cluster: Cluster
    config: ShardingConfig
    words: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    def changed(self, words: str, setting: str, **parts: object) -> _Case:
        return replace(self, words=(*self.words, words), settings=(*self.settings, setting), **parts)  # type: ignore[arg-type]


def find_remediations(planning: Planning, memory_bytes: int | None) -> list[Remediation]:
    """Return single changes with which the job fits, or where there is none pairs of them; the fastest first."""
    case = _Case(planning.job, planning.cluster, planning.config)
    changes: tuple[Callable[[_Case, int | None], _Case | None], ...] = (
        _uvm_caching,
        _half_precision_tables,
        _smaller_state,
        _more_types,
        _smaller_batch,
        _more_nodes,
    )
    remediations = [found for change in changes for found in _try(case, (change,), memory_bytes)]
    if not remediations:
        # The last three search for what it takes, given the change before them.
        remediations = [
            found for pair in itertools.combinations(changes, 2) for found in _try(case, pair, memory_bytes)
        ]
    return sorted(remediations, key=lambda remediation: -remediation.samples_per_s)


def _try(
    case: _Case, changes: tuple[Callable[[_Case, int | None], _Case | None], ...], memory_bytes: int | None
) -> Iterator[Remediation]:
    for change in changes:
        try:
            changed = change(case, memory_bytes)
        except PlanError:  # the change contradicts a constraint: no remediation
            return
        if changed is None:
            return
        case = changed
    found = _solve(case, memory_bytes)
    if found is None:
        return
    planning, solution = found
    step_s = predict(planning, solution).total_s
    yield Remediation(" and ".join(case.words), " ".join(case.settings), step_s, case.job.global_batch_size / step_s)


def _solve(case: _Case, memory_bytes: int | None) -> tuple[Planning, Solution] | None:
    try:
        planning = prepare(case.job, case.cluster, case.config, memory_bytes)
    except PlanError:
        return None
    found = solve(planning)
    return (planning, found) if isinstance(found, Solution) else None


def _more_types(case: _Case, memory_bytes: int | None) -> _Case | None:
    """Let the tables that found no place, and no others, use sharding types that the recipe does not allow."""
    types = tuple(dict.fromkeys([*case.config.types, *ALL_TYPES]))
    config, named = case.config, tuple[str, ...]()
    for _ in range(MAX_ROUNDS):
        planning = prepare(case.job, case.cluster, config, memory_bytes)
        found = solve(planning)
        if isinstance(found, Solution):
            return _cut_as_found(case, planning, found, named) if named else case
        new = [table.name for item in found.items for table in planning.items[item].tables if table.name not in named]
        if not new or planning.budget.for_tables < 0:
            return None
        named = (*named, *new)
        freed = TableConstraint(tables=named, types=types)
        config = case.config.model_copy(update={"constraints": (*case.config.constraints, freed)})
    return None


def _cut_as_found(case: _Case, planning: Planning, solution: Solution, named: tuple[str, ...]) -> _Case:
    """Ask for the types that the search chose for the tables whose types were relaxed."""
    by_type: dict[str, list[str]] = {}
    for name, (option, _) in chosen_options(planning, solution).items():
        if name in named and option.sharding_type not in case.config.types:
            by_type.setdefault(option.sharding_type, []).append(name)
    words = []
    for sharding_type, names in by_type.items():
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        words.append(f"{sharding_type} on {', '.join(names[:MAX_NAMES])}{more}")
    added = tuple(TableConstraint(tables=tuple(names), types=(key,)) for key, names in by_type.items())
    config = case.config.model_copy(update={"constraints": (*case.config.constraints, *added)})
    tables = ", ".join(_toml_table(constraint) for constraint in config.constraints)
    return case.changed(f"with {'; '.join(words)}", f"--sharding.constraints='[{tables}]'", config=config)


def _toml_table(constraint: TableConstraint) -> str:
    pairs = constraint.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    return "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in pairs.items()) + "}"


def _uvm_caching(case: _Case, memory_bytes: int | None) -> _Case | None:
    """Keep tables in the hosts' memory, with a cache on the device."""
    if case.cluster.hardware.device == "cpu" or "fused_uvm_caching" in case.config.kernels:
        return None
    kernels = (*case.config.kernels, "fused_uvm_caching")
    config = case.config.model_copy(update={"kernels": kernels})
    words = f"with UVM caching at {case.config.cache_load_factor:g}"
    return case.changed(words, f"--sharding.kernels='{_toml_list(kernels)}'", config=config)


def _half_precision_tables(case: _Case, memory_bytes: int | None) -> _Case | None:
    if all(table.precision == "fp16" for table in case.job.tables):
        return None
    tables = tuple(replace(table, precision="fp16") for table in case.job.tables)
    return case.changed("with fp16 weights", "--model.table_precision=fp16", job=replace(case.job, tables=tables))


def _smaller_state(case: _Case, memory_bytes: int | None) -> _Case | None:
    """Row-wise Adagrad keeps one number a row."""
    if SPARSE_STATE_BYTES[case.job.sparse_optimizer][0] == 0:
        return None
    job = replace(case.job, sparse_optimizer="rowwise_adagrad")
    return case.changed("with row-wise Adagrad", "--optimizer.sparse.name=rowwise_adagrad", job=job)


def _smaller_batch(case: _Case, memory_bytes: int | None) -> _Case | None:
    """The largest batch that fits, halving."""
    batch = case.job.global_batch_size
    while batch // 2 >= MIN_BATCH_PER_RANK * case.cluster.num_ranks:
        batch //= 2
        job = replace(case.job, global_batch_size=batch)
        if _solve(replace(case, job=job), memory_bytes) is not None:
            return case.changed(f"at batch {batch:,}", f"--train.global_batch_size={batch}", job=job)
    return None


def _more_nodes(case: _Case, memory_bytes: int | None) -> _Case | None:
    """The fewest whole hosts with which it fits (for less than a host: the fewest ranks), groups kept in number."""
    cluster = case.cluster
    unit = (
        "ranks_per_node"
        if cluster.num_nodes == 1 and cluster.ranks_per_node < cluster.hardware.ranks_per_host
        else None
    )
    if unit:
        for ranks in range(cluster.ranks_per_node + 1, cluster.hardware.ranks_per_host + 1):
            larger = replace(cluster, ranks_per_node=ranks)
            if not ranks % cluster.num_groups and _solve(replace(case, cluster=larger), memory_bytes) is not None:
                return case.changed(f"with {ranks} {_devices(case)}", f"--ranks-per-node {ranks}", cluster=larger)
        cluster = replace(cluster, ranks_per_node=cluster.hardware.ranks_per_host)
    nodes = _fewest_nodes(replace(case, cluster=cluster), memory_bytes)
    if nodes is None:
        return None
    larger = replace(cluster, num_nodes=nodes)
    return case.changed(
        f"with {larger.num_ranks:,} {_devices(case)} on {nodes:,} hosts", f"--num-nodes {nodes}", cluster=larger
    )


def _fewest_nodes(case: _Case, memory_bytes: int | None) -> int | None:
    """Double until it fits, then halve the gap."""

    def fits(nodes: int) -> bool:
        cluster = replace(case.cluster, num_nodes=nodes)
        if cluster.num_ranks % cluster.num_groups:
            return False
        return _solve(replace(case, cluster=cluster), memory_bytes) is not None

    too_few, enough = case.cluster.num_nodes, case.cluster.num_nodes * 2
    while not fits(enough):
        too_few, enough = enough, enough * 2
        if enough > MAX_NODES or enough * case.cluster.ranks_per_node * MIN_BATCH_PER_RANK > case.job.global_batch_size:
            return None
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if fits(middle) else (middle, enough)
    return enough


def _devices(case: _Case) -> str:
    return "GPUs" if case.cluster.hardware.device == "cuda" else "ranks"


def _toml_list(values: tuple[str, ...]) -> str:
    return "[" + ", ".join(f'"{value}"' for value in values) + "]"
