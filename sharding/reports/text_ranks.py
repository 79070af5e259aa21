"""The ranks of a plan as lines of text with bars of memory and time; ranks of equal load share a line."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Sequence

from papilio.sharding.plan_file import PlanFile, PlannedRank
from papilio.sharding.reports.figures import bar, milliseconds, rank_ranges, size

MAX_LINES = 24
# Of more lines than MAX_LINES, the ends that are shown.
NUM_HEAVIEST = 16
NUM_LIGHTEST = 4
MAX_LABEL = 16
MIN_BAR = 8
MAX_BAR = 40
# Loads that differ by less than this share of the largest are drawn as equal.
EQUAL_SHARE = 0.01


def format_ranks(plan: PlanFile, width: int, *, show_all: bool) -> list[str]:
    """Return the ranks, those with most memory first when they are grouped, with the imbalance on top."""
    ranks = list(plan.ranks)
    groups = [[rank] for rank in ranks] if show_all else _equal(ranks)
    heading = f"Ranks  {_usable(plan)}"
    if plan.machine.num_groups > 1:
        heading += f"; of the first of {plan.machine.num_groups} groups, which are alike"
    lines = [*textwrap.wrap(heading, width, subsequent_indent="  "), *_balance(ranks)]
    if len(groups) <= MAX_LINES or show_all:
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
