"""What differs between two plans, as values; sharding/reports/diff.py puts them in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from papilio.sharding.plan_file import PlanFile, PlannedTable, ShardPlace
from papilio.sharding.reports.figures import count, places, size, step_parts
from papilio.sharding.reports.moves import bytes_on_ranks, held_places, moved_bytes


@dataclass(frozen=True)
class TableChange:
    """One table that both plans have, placed or shaped differently.

    Attributes:
        name: of the table.
        kind: how it was and how it is, without ranks; changes of one kind share a line when there are many.
        words: how it was and how it is.
        cost_s: seconds of its most loaded rank, new less old.
        rank_bytes: bytes of weights and optimizer, new less old, of the ranks where they differ.
        moved_bytes: bytes that ranks must be sent; None where the table's shape changed and nothing can be kept.
    """

    name: str
    kind: str
    words: str
    cost_s: float
    rank_bytes: dict[int, int]
    moved_bytes: int | None


@dataclass(frozen=True)
class PlanDiff:
    """What differs between two plans; all empty and equal when nothing does.

    Attributes:
        job: sentences on machine, batch, optimizer and precision.
        added, removed: tables of the new and of the old plan only.
        changed: tables of both.
        parts: name and seconds of each part of the step, old and new.
        step_s: seconds of a step, old and new.
        samples_per_s: old and new.
        peak_bytes: for each rank the device memory, old and new.
        usable_bytes: of a rank, old and new.
        num_groups: groups of ranks that hold a copy of the tables each; ranks and bytes are those of the first.
        is_empty: nothing differs but the version of Papilio that wrote the files.
    """

    job: tuple[str, ...]
    added: tuple[PlannedTable, ...]
    removed: tuple[PlannedTable, ...]
    changed: tuple[TableChange, ...]
    parts: tuple[tuple[str, float, float], ...]
    step_s: tuple[float, float]
    samples_per_s: tuple[float, float]
    peak_bytes: tuple[dict[int, int], dict[int, int]]
    usable_bytes: tuple[int, int]
    num_groups: tuple[int, int]
    is_empty: bool

    @property
    def moved_bytes(self) -> int:
        """Bytes of tables of both plans that change rank, in the first group of ranks."""
        return sum(change.moved_bytes or 0 for change in self.changed)


def diff_plans(old: PlanFile, new: PlanFile) -> PlanDiff:
    """Compare two plans table by table, rank by rank and part by part."""
    before = {table.name: table for table in old.tables}
    after = {table.name: table for table in new.tables}
    changes = [_table_change(before[name], table, old, new) for name, table in after.items() if name in before]
    changed = [change for change in changes if change is not None]
    return PlanDiff(
        job=tuple(_job_changes(old, new)),
        added=tuple(table for name, table in after.items() if name not in before),
        removed=tuple(table for name, table in before.items() if name not in after),
        changed=tuple(sorted(changed, key=lambda change: -abs(change.cost_s))),
        parts=tuple(_parts(old, new)),
        step_s=(old.step.total_s, new.step.total_s),
        samples_per_s=(old.samples_per_s, new.samples_per_s),
        peak_bytes=(_peaks(old), _peaks(new)),
        usable_bytes=(old.machine.usable_memory_bytes, new.machine.usable_memory_bytes),
        num_groups=(old.machine.num_groups, new.machine.num_groups),
        is_empty=old == new.model_copy(update={"papilio_version": old.papilio_version}),
    )


def _job_changes(old: PlanFile, new: PlanFile) -> Iterator[str]:
    """Say what is not about tables."""
    was, now = old.machine, new.machine
    facts = {
        "recipe": (old.recipe, new.recipe),
        "hardware": (was.hardware, now.hardware),
        "device": (was.device, now.device),
        "ranks": (_ranks(old), _ranks(new)),
        "memory of a rank": (size(was.device_memory_bytes), size(now.device_memory_bytes)),
        "usable of it": (size(was.usable_memory_bytes), size(now.usable_memory_bytes)),
        "host memory": (size(was.host_memory_bytes), size(now.host_memory_bytes)),
        "global batch": (f"{old.global_batch_size:,}", f"{new.global_batch_size:,}"),
        "sparse optimizer": (old.sparse_optimizer, new.sparse_optimizer),
        "precision of the dense part": (old.precision, new.precision),
    }
    for name, (before, after) in facts.items():
        if before != after:
            yield f"{name}: {before} -> {after}"
    if was.description != now.description and was.hardware == now.hardware:
        yield f"description of {now.hardware}: {was.description} -> {now.description}"


def _ranks(plan: PlanFile) -> str:
    machine = plan.machine
    groups = f" in {machine.num_groups} groups" if machine.num_groups > 1 else ""
    return f"{machine.num_ranks} ({machine.num_nodes} x {machine.ranks_per_node}){groups}"


def _parts(old: PlanFile, new: PlanFile) -> Iterator[tuple[str, float, float]]:
    was = {part.name: part.seconds for part in step_parts(old)}
    now = {part.name: part.seconds for part in step_parts(new)}
    for name in dict.fromkeys([*was, *now]):
        yield name, was.get(name, 0.0), now.get(name, 0.0)


def _peaks(plan: PlanFile) -> dict[int, int]:
    return {rank.rank: rank.memory.device_bytes for rank in plan.ranks}


def _table_change(old: PlannedTable, new: PlannedTable, old_plan: PlanFile, new_plan: PlanFile) -> TableChange | None:
    """Compare one table; None when it is placed, shaped and used alike, even if it takes longer or shorter."""
    shape = _shape_changes(old, new)
    was, now = _way(old), _way(new)
    is_moved = sorted(map(_key, held_places(old))) != sorted(map(_key, held_places(new)))
    if not shape and not is_moved and was == now:
        return None
    resized = (old.num_embeddings, old.embedding_dim) != (new.num_embeddings, new.embedding_dim)
    held, holds = Counter(bytes_on_ranks(old)), bytes_on_ranks(new)
    difference = {rank: holds.get(rank, 0) - held[rank] for rank in sorted({*held, *holds})}
    words, kind = list(shape), ["resized"] if resized else ["used otherwise"] if shape else []
    if is_moved or was != now:
        words.append(_move(was, _where(old, old_plan), now, _where(new, new_plan)))
        kind.append(f"{was} -> {now}" if was != now else f"{now}, on other ranks")
    return TableChange(
        name=new.name,
        kind=", ".join(kind),
        words="; ".join(words),
        cost_s=new.phases.total_s - old.phases.total_s,
        rank_bytes={rank: change for rank, change in difference.items() if change},
        moved_bytes=None if resized else moved_bytes(old, new),
    )


def _move(was: str, where_was: str, now: str, where_now: str) -> str:
    if was != now:
        return f"{was} {where_was} -> {now} {where_now}"
    return f"{was} {where_was}, cut otherwise" if where_was == where_now else f"{was} {where_was} -> {where_now}"


def _key(place: ShardPlace) -> tuple[int, ...]:
    return place.rank, place.row, place.column, place.num_rows, place.num_columns


def _shape_changes(old: PlannedTable, new: PlannedTable) -> list[str]:
    """Say what changed of the table itself."""
    facts = {
        "rows": (count(old.num_embeddings), count(new.num_embeddings)),
        "dim": (old.embedding_dim, new.embedding_dim),
        "ids a sample": (f"{old.pooling_factor:g}", f"{new.pooling_factor:g}"),
        "pooling": (old.pooling, new.pooling),
        "precision": (old.precision, new.precision),
        "feature": (old.feature, new.feature),
        "module": (old.module, new.module),
    }
    if old.num_embeddings != new.num_embeddings:
        facts["rows"] = (f"{old.num_embeddings:,}", f"{new.num_embeddings:,}")
    return [f"{name} {before} -> {after}" for name, (before, after) in facts.items() if before != after]


def _way(table: PlannedTable) -> str:
    """Name sharding type and, where it is not the usual one, kernel."""
    kernel = "" if table.compute_kernel in ("fused", "dense") else f" {table.compute_kernel}"
    cache = "" if table.cache_load_factor is None else f" {table.cache_load_factor:g}"
    return f"{table.sharding_type}{kernel}{cache}"


def _where(table: PlannedTable, plan: PlanFile) -> str:
    return places(table.ranks, len(plan.ranks))
