"""`papilio plan --explain`: a table's options, one a line, as text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from papilio.sharding.plan_file import PlanFile
from papilio.sharding.planner.explain import OptionReport

GIB = 1 << 30
MIB = 1 << 20


def format_explanation(
    reports: Sequence[OptionReport], plan: PlanFile, num_columns: int, *, show_all: bool = False
) -> str:
    """Return the options as a table, the chosen one first, then by the step that each would make.

    Args:
        reports: of `explain_table`.
        plan: the plan that they are about.
        num_columns: width of the terminal.
        show_all: list every option, not only the best of each sharding type.
    """
    table = reports[0].option.table
    placed = next(found for found in plan.tables if found.name == table.name)
    shown = list(reports) if show_all else _best_of_each_type(reports)
    width = max(len(report.option.describe()) for report in shown)
    lines = [
        f"{table.name}: {table.num_embeddings:,} rows x {table.embedding_dim}, {table.pooling_factor:g} id(s) a "
        f"sample, {_size(table.weights_bytes)} of weights; {plan.machine.num_ranks} rank(s) of {plan.machine.hardware}",
        f"chosen: {reports[0].option.describe()} on {_ranks(placed.ranks)}",
        "",
        f"  {'option':<{width}}{'on a rank':>11}{'ms there':>10}{'step ms':>10}",
    ]
    for report in shown:
        step = "-" if report.step_ms is None else f"{report.step_ms:,.2f}"
        mark = ">" if report.is_chosen else " "
        name = report.option.describe()
        lines.append(f"{mark} {name:<{width}}{_size(report.shard_bytes):>11}{report.shard_ms:>10.3f}{step:>10}")
        if not report.is_chosen:
            lines += textwrap.wrap(report.reason, num_columns, initial_indent="    ", subsequent_indent="    ")
    if len(shown) < len(reports):
        lines.append(f"  the best of each type; {len(reports) - len(shown)} more with --all")
    note = (
        "on a rank: memory of its largest shard with buffers; ms there: what a shard adds to its rank; step: of the "
        "whole job, with all other tables free to move"
    )
    return "\n".join([*lines, "", *textwrap.wrap(note, num_columns)])


def _best_of_each_type(reports: Sequence[OptionReport]) -> list[OptionReport]:
    """The first report of each sharding type; of two types with the same figures the simpler one."""
    best: dict[str, OptionReport] = {}
    for report in reports:
        best.setdefault(report.option.sharding_type, report)
    return list(best.values())


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / MIB:,.1f} MiB"


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
