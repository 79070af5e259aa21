"""`papilio plan` on a terminal: the step, a table of tables, and the balance of the ranks.

Of many tables those alike share a line, as do ranks of equal load; `--all` lists each.
"""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Hashable, Sequence

from papilio.sharding.plan_file import PlanFile, PlannedRank, PlannedTable
from papilio.sharding.reports.figures import bar, count, milliseconds, percent, rank_ranges, size, step_parts

MIN_COLUMNS = 80
MIN_BAR = 8
MAX_BAR = 40
# More tables than this are grouped, but for those that cost most.
MAX_TABLE_LINES = 32
NUM_DEAREST = 12
NUM_TRAITS = 3
MIN_NAME = 12
MAX_NAME = 40
MAX_RANKS_CELL = 12
# Marks of the other kernels, which a line under the table explains.
KERNEL_MARKS = {"fused_uvm": "¹", "fused_uvm_caching": "²"}
HEADINGS = ("table", "rows", "dim", "ids", "type", "ranks", "size", "ms")
LEFT_ALIGNED = {"table", "type", "ranks"}
MAX_RANK_LINES = 24
# Of more lines than MAX_RANK_LINES, the ends that are shown.
NUM_HEAVIEST = 16
NUM_LIGHTEST = 4
MAX_LABEL = 16
# Loads that differ by less than this share of the largest are drawn as equal.
EQUAL_SHARE = 0.01

Row = tuple[str, ...]


def format_plan(plan: PlanFile, num_columns: int, *, show_all: bool) -> str:
    """Return a plan as text of at most `num_columns` columns, and no fewer than 80.

    Args:
        plan: what to show.
        num_columns: width of the terminal.
        show_all: a line for every table and every rank; otherwise those alike share a line.
    """
    width = max(MIN_COLUMNS, num_columns)
    sections = [
        _head(plan, width),
        _step(plan, width),
        _tables_section(plan, width, show_all=show_all),
        _ranks_section(plan, width, show_all=show_all),
    ]
    if plan.notes:
        sections.append(["Notes", *_notes(plan.notes, width)])
    return "\n\n".join("\n".join(lines) for lines in sections)


def _head(plan: PlanFile, width: int) -> list[str]:
    machine = plan.machine
    ranks = f"{machine.num_ranks} rank{'s' if machine.num_ranks > 1 else ''}"
    nodes = f" ({machine.num_nodes} nodes of {machine.ranks_per_node})" if machine.num_nodes > 1 else ""
    groups = f", {machine.num_groups} groups of {machine.group_size}" if machine.num_groups > 1 else ""
    weights = sum(table.weights_bytes for table in plan.tables)
    facts = (
        f"{len(plan.tables)} tables, {size(weights)} of weights; global batch {plan.global_batch_size:,}; "
        f"{plan.sparse_optimizer}; {plan.precision}"
    )
    title = f"{plan.recipe} on {machine.hardware}, {ranks}{nodes}{groups}"
    return [line for text in (title, machine.description, facts) for line in textwrap.wrap(text, width)]


def _step(plan: PlanFile, width: int) -> list[str]:
    parts = step_parts(plan)
    names = max(len(part.name) for part in parts)
    longest = max(abs(part.seconds) for part in parts)
    bar_width = min(MAX_BAR, width - names - 24)
    lines = [f"Step  {milliseconds(plan.step.total_s)} ms, {count(plan.samples_per_s)} samples/s (predicted)"]
    for part in parts:
        drawn = bar(abs(part.seconds) / longest, bar_width)
        share = part.seconds / plan.step.total_s
        lines.append(f"  {part.name:<{names}}  {drawn} {milliseconds(part.seconds):>9} ms {percent(share):>5}")
    return lines


def _notes(notes: Sequence[str], width: int) -> list[str]:
    return [line for note in notes for line in textwrap.wrap(note, width, initial_indent="- ", subsequent_indent="  ")]


def _tables_section(plan: PlanFile, width: int, *, show_all: bool) -> list[str]:
    """Return the tables, those that cost most first."""
    tables = sorted(plan.tables, key=lambda table: -table.phases.total_s)
    groups = [[table] for table in tables]
    if not show_all and len(tables) > MAX_TABLE_LINES:
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
            placement = (table.sharding_type, table.compute_kernel, table.cache_load_factor)
            groups[(placement, _traits(table)[:num_traits])].append(table)
        if len(groups) <= MAX_TABLE_LINES - NUM_DEAREST:
            break
    return list(groups.values())


def _traits(table: PlannedTable) -> tuple[float, ...]:
    """What tables of a group have in common, the most distinctive first: dim, ids a sample, rows' power of ten."""
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
    return text if len(text) <= MAX_RANKS_CELL else f"{len(ranks)} ranks"


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
            cell.ljust(cell_width) if heading in LEFT_ALIGNED else cell.rjust(cell_width)
            for cell, cell_width, heading in zip(cells, widths, HEADINGS, strict=True)
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


def _ranks_section(plan: PlanFile, width: int, *, show_all: bool) -> list[str]:
    """Return the ranks, those with most memory first when they are grouped, with the imbalance on top."""
    ranks = list(plan.ranks)
    groups = [[rank] for rank in ranks] if show_all else _equal(ranks)
    heading = f"Ranks  {_usable(plan)}"
    if plan.machine.num_groups > 1:
        heading += f"; of the first of {plan.machine.num_groups} groups, which are alike"
    lines = [*textwrap.wrap(heading, width, subsequent_indent="  "), *_balance(ranks)]
    if len(groups) <= MAX_RANK_LINES or show_all:
        return [*lines, *_draw(groups, plan, width)]
    drawn = _draw([*groups[:NUM_HEAVIEST], *groups[-NUM_LIGHTEST:]], plan, width)
    left_out = sum(len(group) for group in groups[NUM_HEAVIEST:-NUM_LIGHTEST])
    between = f"  … {left_out} ranks between; --all lists them"
    return [*lines, *drawn[: 1 + NUM_HEAVIEST], between, *drawn[1 + NUM_HEAVIEST :]]


def _usable(plan: PlanFile) -> str:
    machine = plan.machine
    return f"{size(machine.usable_memory_bytes)} usable of {size(machine.device_memory_bytes)} each"


def _balance(ranks: Sequence[PlannedRank]) -> list[str]:
    """Say how far the fullest and the slowest rank are above the mean."""
    lines = []
    for name, values, write in (
        ("memory", [float(rank.memory.device_bytes) for rank in ranks], size),
        ("embedding time", [rank.phases.total_s for rank in ranks], lambda s: f"{milliseconds(s)} ms"),
    ):
        most, mean = max(values), sum(values) / len(values)
        where = ranks[values.index(most)].rank
        if mean > 0:
            lines.append(f"  {name}: max {write(most)} (rank {where}), mean {write(mean)}, max/mean {most / mean:.2f}")
    return lines


def _equal(ranks: Sequence[PlannedRank]) -> list[list[PlannedRank]]:
    """Group ranks of (nearly) the same memory and time; the fullest and slowest first."""
    most_bytes = max(rank.memory.device_bytes for rank in ranks) or 1
    most_s = max(rank.phases.total_s for rank in ranks) or 1.0
    groups: dict[tuple[int, int, int], list[PlannedRank]] = defaultdict(list)
    for rank in ranks:
        fullness = round(rank.memory.device_bytes / most_bytes / EQUAL_SHARE)
        slowness = round(rank.phases.total_s / most_s / EQUAL_SHARE)
        groups[(fullness, slowness, round(rank.memory.host_bytes / most_bytes / EQUAL_SHARE))].append(rank)
    return sorted(groups.values(), key=lambda group: (-max(r.memory.device_bytes for r in group), group[0].rank))


def _draw(groups: Sequence[Sequence[PlannedRank]], plan: PlanFile, width: int) -> list[str]:
    labels = [_label(group) for group in groups]
    label_width = max(5, *(len(label) for label in labels))
    has_host = any(rank.memory.host_bytes for rank in plan.ranks)
    fixed = 2 + label_width + 8 + 2 + 10 + 2 + 9 + (11 if has_host else 0)
    bar_width = max(MIN_BAR, min(MAX_BAR, (width - fixed) // 2))
    longest = max(rank.phases.total_s for rank in plan.ranks) or 1.0
    capacity = max(1, plan.machine.device_memory_bytes)
    host = f"{'on host':>11}" if has_host else ""
    memory_heading, time_heading = "memory".ljust(bar_width), "embeddings".ljust(bar_width)
    lines = [f"  {'ranks':<{label_width}}  shards  {memory_heading}{'':>10}  {time_heading}{'ms':>9}{host}"]
    for label, group in zip(labels, groups, strict=True):
        fullest = max(group, key=lambda rank: rank.memory.device_bytes)
        slowest = max(group, key=lambda rank: rank.phases.total_s)
        shards = max(rank.num_shards for rank in group)
        memory = fullest.memory.device_bytes
        host = f"{size(max(rank.memory.host_bytes for rank in group)):>11}" if has_host else ""
        lines.append(
            f"  {label:<{label_width}}  {shards:>6}  {bar(memory / capacity, bar_width, '·')}{size(memory):>10}  "
            f"{bar(slowest.phases.total_s / longest, bar_width, '·')}{milliseconds(slowest.phases.total_s):>9}{host}"
        )
    return lines


def _label(group: Sequence[PlannedRank]) -> str:
    return rank_ranges((rank.rank for rank in group), MAX_LABEL)
