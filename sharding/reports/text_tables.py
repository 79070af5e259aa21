"""The tables of a plan as lines of text; of many, those alike share a line."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Hashable, Sequence

from papilio.sharding.plan_file import PlanFile, PlannedTable
from papilio.sharding.reports.figures import count, milliseconds, rank_ranges, size

# More tables than this are grouped, but for those that cost most.
MAX_LINES = 32
NUM_DEAREST = 12
NUM_TRAITS = 3
MIN_NAME = 12
MAX_NAME = 40
MAX_RANKS = 12
# Marks of the other kernels, which a line under the table explains.
KERNEL_MARKS = {"fused_uvm": "¹", "fused_uvm_caching": "²"}
HEADINGS = ("table", "rows", "dim", "ids", "type", "ranks", "size", "ms")
LEFT_ALIGNED = {"table", "type", "ranks"}

Row = tuple[str, ...]


def format_tables(plan: PlanFile, width: int, *, show_all: bool) -> list[str]:
    """Return the tables, those that cost most first."""
    tables = sorted(plan.tables, key=lambda table: -table.phases.total_s)
    groups = [[table] for table in tables]
    if not show_all and len(tables) > MAX_LINES:
        groups = [*groups[:NUM_DEAREST], *_alike(tables[NUM_DEAREST:])]
    lines = _align([HEADINGS, *(_row(group, plan) for group in groups)], width)
    kernels = {table.compute_kernel for table in tables}
    remarks = [f"{mark} {_kernel(kernel, tables)}" for kernel, mark in KERNEL_MARKS.items() if kernel in kernels]
    if any(len(group) > 1 for group in groups):
        remarks.append("+N: as many more alike; size of all, ms of the dearest; --all lists each")
    wrapped = [textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ") for text in remarks]
    kinds = textwrap.wrap(f"Tables  {_kinds(tables)}", width, subsequent_indent="  ")
    return [*kinds, *lines, *(line for text in wrapped for line in text)]


def _kinds(tables: Sequence[PlannedTable]) -> str:
    counts: dict[str, int] = defaultdict(int)
    for table in tables:
        counts[table.sharding_type] += 1
    return ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items(), key=lambda item: -item[1]))


def _kernel(kernel: str, tables: Sequence[PlannedTable]) -> str:
    """Say how many tables have a kernel, and how much of them its cache holds."""
    having = [table for table in tables if table.compute_kernel == kernel]
    factors = [table.cache_load_factor for table in having if table.cache_load_factor is not None]
    cached = f", {_range(factors)} of the rows cached on the device" if factors else ""
    return f"{kernel}: {len(having)} table{'s' if len(having) > 1 else ''}{cached}"


def _alike(tables: Sequence[PlannedTable]) -> list[list[PlannedTable]]:
    """Group tables placed in the same way, by as much of their shape as leaves few enough groups."""
    groups: dict[Hashable, list[PlannedTable]] = {}
    for num_traits in range(NUM_TRAITS, -1, -1):
        groups = defaultdict(list)
        for table in tables:
            way = (table.sharding_type, table.compute_kernel, table.cache_load_factor)
            groups[(way, _traits(table)[:num_traits])].append(table)
        if len(groups) <= MAX_LINES - NUM_DEAREST:
            break
    return list(groups.values())


def _traits(table: PlannedTable) -> tuple[float, ...]:
    """What tables of a group have in common, the most telling first: dim, ids a sample, rows' power of ten."""
    return table.embedding_dim, table.pooling_factor, int(math.log10(max(1, table.num_embeddings)))


def _row(group: Sequence[PlannedTable], plan: PlanFile) -> Row:
    first = group[0]
    ranks = {rank for table in group for rank in table.ranks}
    everywhere = len(ranks) == len(plan.ranks) > 1
    return (
        first.name if len(group) == 1 else f"{first.name} +{len(group) - 1}",
        _range([table.num_embeddings for table in group]),
        _range([table.embedding_dim for table in group]),
        _range([table.pooling_factor for table in group]),
        f"{first.sharding_type}{KERNEL_MARKS.get(first.compute_kernel, '')}",
        "all" if everywhere else _ranks(ranks),
        size(sum(table.weights_bytes for table in group)),
        milliseconds(first.phases.total_s),
    )


def _ranks(ranks: set[int]) -> str:
    text = rank_ranges(ranks)
    return text if len(text) <= MAX_RANKS else f"{len(ranks)} ranks"


def _range(numbers: Sequence[float]) -> str:
    least, most = min(numbers), max(numbers)
    return count(least) if least == most else f"{count(least, 2)}-{count(most, 2)}"


def _align(rows: Sequence[Row], width: int) -> list[str]:
    """Pad the columns; names get what the others leave and are cut in their middle where that is too little."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    gap = 2 if sum(widths) - widths[0] + MIN_NAME + 2 * len(widths) <= width else 1
    others = sum(widths[1:]) + gap * (len(widths) - 1) + 2
    widths[0] = min(widths[0], max(MIN_NAME, min(MAX_NAME, width - others)))
    lines = []
    for row in rows:
        cells = (_cut(row[0], widths[0]), *row[1:])
        padded = [
            cell.ljust(size) if heading in LEFT_ALIGNED else cell.rjust(size)
            for cell, size, heading in zip(cells, widths, HEADINGS, strict=True)
        ]
        lines.append(("  " + (" " * gap).join(padded)).rstrip())
    return lines


def _cut(text: str, width: int) -> str:
    """Leave out the middle of a name that is too long; the number of tables alike stays whole."""
    if len(text) <= width:
        return text
    name, plus, number = text.partition(" +")
    kept = width - len(plus + number) - 1
    return f"{name[: kept - kept // 2]}…{name[-(kept // 2) :]}{plus}{number}"
