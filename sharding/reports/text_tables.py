"""The tables of a plan as lines of text; of many, those alike share a line."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

from sharding.plan_file import PlanFile, PlannedTable
from sharding.reports.figures import count, milliseconds, rank_ranges, size

# More tables than this are grouped, more groups than this are cut off.
MAX_LINES = 32
MIN_NAME = 12
MAX_NAME = 40
MAX_RANKS = 16
HEADINGS = ("table", "rows", "dim", "ids", "type", "ranks", "size", "ms")
LEFT_ALIGNED = {"table", "type", "ranks"}

Row = tuple[str, ...]


def format_tables(plan: PlanFile, width: int, *, show_all: bool) -> list[str]:
    """Return the tables, those that cost most first."""
    tables = sorted(plan.tables, key=lambda table: -table.phases.total_s)
    groups = [[table] for table in tables]
    if not show_all and len(tables) > MAX_LINES:
        groups = _alike(tables)
    shown = groups if show_all else groups[:MAX_LINES]
    lines = _align([HEADINGS, *(_row(group, plan) for group in shown)], width)
    rest = [table for group in groups[len(shown) :] for table in group]
    if rest:
        total = size(sum(table.weights_bytes for table in rest))
        most = milliseconds(max(table.phases.total_s for table in rest))
        lines.append(f"  and {len(rest)} more tables of {total}, none above {most} ms; --all lists them")
    if any(len(group) > 1 for group in shown):
        lines.append("  +N: as many more alike; size of all of them, ms of the dearest")
    return [f"Tables  {_kinds(tables)}", *lines]


def _kinds(tables: Sequence[PlannedTable]) -> str:
    counts: dict[str, int] = defaultdict(int)
    for table in tables:
        counts[table.sharding_type] += 1
    return ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items(), key=lambda item: -item[1]))


def _alike(tables: Sequence[PlannedTable]) -> list[list[PlannedTable]]:
    """Group tables placed in the same way, of the same width, and of rows of the same power of ten."""
    groups: dict[Hashable, list[PlannedTable]] = defaultdict(list)
    for table in tables:
        magnitude = int(math.log10(max(1, table.num_embeddings)))
        way = (table.sharding_type, table.compute_kernel, len(set(table.ranks)))
        groups[(*way, table.embedding_dim, table.pooling_factor, magnitude)].append(table)
    return list(groups.values())


def _row(group: Sequence[PlannedTable], plan: PlanFile) -> Row:
    first = group[0]
    rows = sorted(table.num_embeddings for table in group)
    kernel = "" if first.compute_kernel in ("fused", "dense") else f" {first.compute_kernel}"
    if first.cache_load_factor is not None:
        kernel += f" {first.cache_load_factor:g}"
    ranks = {rank for table in group for rank in table.ranks}
    everywhere = len(ranks) == len(plan.ranks) > 1
    return (
        first.name if len(group) == 1 else f"{first.name} +{len(group) - 1}",
        count(rows[0]) if rows[0] == rows[-1] else f"{count(rows[0])}-{count(rows[-1])}",
        str(first.embedding_dim),
        f"{first.pooling_factor:g}",
        first.sharding_type + kernel,
        "all" if everywhere else rank_ranges(ranks, MAX_RANKS),
        size(sum(table.weights_bytes for table in group)),
        milliseconds(first.phases.total_s),
    )


def _align(rows: Sequence[Row], width: int) -> list[str]:
    """Pad the columns; names get what the others leave and are cut in their middle where that is too little."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    others = sum(widths[1:]) + 2 * len(widths)
    widths[0] = min(widths[0], max(MIN_NAME, min(MAX_NAME, width - others)))
    lines = []
    for row in rows:
        cells = (_cut(row[0], widths[0]), *row[1:])
        padded = [
            cell.ljust(size) if heading in LEFT_ALIGNED else cell.rjust(size)
            for cell, size, heading in zip(cells, widths, HEADINGS, strict=True)
        ]
        lines.append(("  " + "  ".join(padded)).rstrip())
    return lines


def _cut(name: str, width: int) -> str:
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}…{name[-tail:]}"
