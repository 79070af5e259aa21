"""`papilio plan diff OLD NEW`: what moved between two plans, and what it costs, in words."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence

from papilio.sharding.plan_file import PlannedTable
from papilio.sharding.reports.changes import PlanDiff, TableChange, diff_plans
from papilio.sharding.reports.figures import count, milliseconds, rank_ranges, size

__all__ = ["PlanDiff", "TableChange", "diff_plans", "format_diff"]

# Of more changed tables than this, those of a kind are summed up.
MAX_TABLES = 24
# Of the tables that are summed up, those listed one by one first: they cost or save most.
NUM_DEAREST = 8
MAX_NAMES = 4
# A part of the step, or a rank's memory, that changes by less is not worth a line.
NOTABLE_S = 5e-6
NOTABLE_BYTES = 1 << 20
# Ranks whose changes differ by no more than this share are on one line.
ALIKE_SHARE = 0.02


def format_diff(diff: PlanDiff, num_columns: int) -> str:
    """Return the differences as text of at most `num_columns` columns, the job first; many alike are summed up."""
    if diff.is_empty:
        return "the plans are the same"
    sections = [
        _job(diff, num_columns),
        _step(diff, num_columns),
        _memory(diff, num_columns),
        _tables(diff, num_columns),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _step(diff: PlanDiff, columns: int) -> list[str]:
    """The step before and after, and the parts that changed."""
    old, new = diff.step_s
    rates = " -> ".join(count(rate) for rate in diff.samples_per_s)
    if abs(new - old) < NOTABLE_S / 10:
        head = f"Step  {milliseconds(new)} ms in both"
    else:
        head = f"Step  {milliseconds(old)} -> {milliseconds(new)} ms ({_signed_ms(new - old)}, {new / old - 1:+.1%})"
    if diff.samples_per_s[0] != diff.samples_per_s[1]:
        head += f"; {rates} samples/s"
    lines = _wrap_head(head, columns)
    parts = [part for part in diff.parts if abs(part[2] - part[1]) >= NOTABLE_S]
    width = max((len(name) for name, _, _ in parts), default=0)
    for name, was, now in sorted(parts, key=lambda part: -abs(part[2] - part[1])):
        change = _signed_ms(now - was)
        lines.append(f"  {name:<{width}}  {milliseconds(was):>9} -> {milliseconds(now):>9}  {change:>12}")
    return lines


def _memory(diff: PlanDiff, width: int) -> list[str]:
    """The fullest rank before and after, and the ranks that gain and lose most."""
    old, new = diff.peak_bytes
    fullest = [max(peaks, key=lambda rank: peaks[rank]) for peaks in (old, new)]
    texts = [f"{size(peaks[rank])} on rank {rank}" for peaks, rank in zip(diff.peak_bytes, fullest, strict=True)]
    usable = " -> ".join(dict.fromkeys(map(size, diff.usable_bytes)))
    text = f"{' -> '.join(dict.fromkeys(texts))}; usable {usable}"
    changes = {rank: new[rank] - old[rank] for rank in old if rank in new}
    most_changed = [f"{_signed_size(changes[ranks[0]])} on {_ranks(ranks)}" for ranks in _extremes(changes)]
    head = "Memory  at the peak" if old != new else "Memory  the same on each rank, at most"
    lines = _wrap_head(f"{head} {text}", width)
    if most_changed:
        lines += _wrap(f"most changed: {'; '.join(most_changed)}", width)
    if diff.moved_bytes:
        group = " in the first group of ranks" if max(diff.num_groups) > 1 else ""
        lines += _wrap(f"{size(diff.moved_bytes)} of tables and optimizer state change rank{group}", width)
    return lines


def _extremes(changes: Mapping[int, int]) -> list[list[int]]:
    """Ranks of the greatest gain, and of the greatest loss, with all that gain or lose nearly as much."""
    groups = []
    for extreme in (max(changes.values(), default=0), min(changes.values(), default=0)):
        alike = [rank for rank, change in changes.items() if abs(change - extreme) <= ALIKE_SHARE * abs(extreme)]
        if alike and alike not in groups and abs(extreme) >= NOTABLE_BYTES:
            groups.append(alike)
    return groups


def _job(diff: PlanDiff, width: int) -> list[str]:
    return ["Job", *(line for text in diff.job for line in _wrap(text, width))] if diff.job else []


def _tables(diff: PlanDiff, width: int) -> list[str]:
    """Tables added, removed and changed."""
    if not (diff.added or diff.removed or diff.changed):
        return ["Tables  all placed as before"]
    facts = [(len(diff.changed), "changed"), (len(diff.added), "added"), (len(diff.removed), "removed")]
    lines = ["Tables  " + ", ".join(f"{number} {word}" for number, word in facts if number)]
    for tables, sign in ((diff.added, "+"), (diff.removed, "-")):
        lines += [line for text in _listed(tables, sign) for line in _wrap(text, width)]
    changed = list(diff.changed)
    one_by_one = changed if len(changed) <= MAX_TABLES else changed[:NUM_DEAREST]
    for change in one_by_one:
        lines += _wrap(describe_change(change), width)
    groups: dict[str, list[TableChange]] = defaultdict(list)
    for change in changed[len(one_by_one) :]:
        groups[change.kind].append(change)
    for kind, members in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines += _wrap(_summed(kind, members), width)
    if changed:
        lines.append("  (ms: of the table's most loaded rank; bytes: weights and optimizer state)")
    return lines


def describe_change(change: TableChange) -> str:
    """Say how one table changed and what it costs."""
    effects = [_signed_ms(change.cost_s)] if abs(change.cost_s) >= NOTABLE_S / 10 else []
    for ranks in _extremes(change.rank_bytes):
        each = "each of " if len(ranks) > 1 else ""
        effects.append(f"{_signed_size(change.rank_bytes[ranks[0]])} on {each}{_ranks(ranks)}")
    return f"{change.name}: {change.words}" + (f": {', '.join(effects)}" if effects else "")


def _listed(tables: Sequence[PlannedTable], sign: str) -> list[str]:
    """Tables that only one plan has, the largest first."""
    ordered = sorted(tables, key=lambda table: -table.weights_bytes)
    shown = ordered if len(ordered) <= MAX_TABLES else ordered[:NUM_DEAREST]
    lines = [
        f"{sign} {table.name}: {count(table.num_embeddings)} rows x {table.embedding_dim}, "
        f"{size(table.weights_bytes)}, {table.sharding_type} on {_ranks(table.ranks)}, "
        f"{milliseconds(table.phases.total_s)} ms"
        for table in shown
    ]
    rest = ordered[len(shown) :]
    if rest:
        lines.append(f"{sign} {len(rest)} more of {size(sum(table.weights_bytes for table in rest))} in all")
    return lines


def _summed(kind: str, members: Sequence[TableChange]) -> str:
    """Tell many changes of one kind in one sentence."""
    names = ", ".join(change.name for change in members[:MAX_NAMES])
    more = f" and {len(members) - MAX_NAMES} more" if len(members) > MAX_NAMES else ""
    moved = sum(change.moved_bytes or 0 for change in members)
    least, most = (_signed_ms(pick(change.cost_s for change in members)) for pick in (min, max))
    effects = [f"{least} each" if least == most else f"{least} to {most} each"]
    if all(abs(change.cost_s) < NOTABLE_S / 10 for change in members):
        effects = ["as fast as before"]
    effects += [f"{size(moved)} change rank"] if moved >= NOTABLE_BYTES else []
    return f"{names}{more}: {kind}: {', '.join(effects)}"


def _ranks(ranks: Sequence[int]) -> str:
    distinct = sorted(set(ranks))
    if len(distinct) == 1:
        return f"rank {distinct[0]}"
    text = rank_ranges(distinct)
    return f"ranks {text}" if len(text) <= 24 else f"{len(distinct)} ranks"


def _signed_ms(seconds: float) -> str:
    text = milliseconds(seconds)
    return f"{text} ms" if text.startswith("-") else f"+{text} ms"


def _signed_size(num_bytes: float) -> str:
    return size(num_bytes) if num_bytes < 0 else f"+{size(num_bytes)}"


def _wrap_head(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="      ", break_on_hyphens=False)


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
