"""`papilio plan` on a terminal: the step, a table of tables, and the balance of the ranks."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from papilio.sharding.plan_file import PlanFile
from papilio.sharding.reports.figures import bar, count, milliseconds, percent, size, step_parts
from papilio.sharding.reports.text_ranks import format_ranks
from papilio.sharding.reports.text_tables import format_tables

MIN_COLUMNS = 80
MAX_BAR = 40


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
        format_tables(plan, width, show_all=show_all),
        format_ranks(plan, width, show_all=show_all),
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
