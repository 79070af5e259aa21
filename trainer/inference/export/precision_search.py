"""Which precision each table gets, to meet a budget of bytes at the least measured loss (`--quantize auto`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from papilio.trainer.inference.export.assignment import Choice, smallest
from papilio.trainer.inference.export.feasible_mix import cheapest_mix
from papilio.trainer.inference.export.held_out import HeldOut
from papilio.trainer.inference.export.quality_report import OptionFigures
from papilio.trainer.inference.export.sensitivity import Sensitivity
from papilio.trainer.inference.package.format import (
    PRECISIONS,
    Package,
    PackageError,
    QuantizerName,
    TableEntry,
    row_bytes,
)
from papilio.trainer.inference.package.table_writer import TableChoice

logger = logging.getLogger(__name__)
Options = Mapping[str, Sequence[OptionFigures]]


def choose(
    reference: Package,
    held_out: HeldOut,
    *,
    size_budget: float,
    fixed: Mapping[str, TableChoice],
    quantizer: QuantizerName,
) -> dict[str, TableChoice]:
    """Choose the precision of every table.

    Each table's loss at each precision is measured by itself; their sum is what is made least, exactly. The mix that
    comes of it is measured as well.

    Args:
        reference: a package with all tables in fp32.
        held_out: samples to measure the loss on.
        size_budget: bytes of all tables together, at most, as a share of their fp32 bytes.
        fixed: choices that the user made for single tables; they count towards the budget and are returned as they are.
        quantizer: for the tables that get int4 or int2.

    Returns:
        A choice for every table of the package, by name.

    Raises:
        PackageError: the budget cannot be met; names the smallest that can.
    """
    tables = reference.manifest.tables
    candidates = {
        table.name: [fixed[table.name]] if table.name in fixed else _candidates(quantizer) for table in tables
    }
    budget_bytes = check_budget(tables, candidates, size_budget)
    sensitivity = Sensitivity(reference, held_out)
    options = sensitivity.measure_all(candidates)
    chosen = cheapest_mix(options, budget_bytes)
    assert chosen is not None
    _log_mix(sensitivity, chosen, options)
    return chosen


def check_budget(
    tables: Sequence[TableEntry], candidates: Mapping[str, Sequence[TableChoice]], size_budget: float
) -> int:
    """Return the budget in bytes.

    Raises:
        PackageError: not even the smallest precisions meet it.
    """
    fp32_bytes = sum(table.fp32_bytes for table in tables)
    sizes = [
        [Choice(table.rows * row_bytes(choice.precision, table.dim), 0) for choice in candidates[table.name]]
        for table in tables
    ]
    least = smallest(sizes)
    if least > size_budget * fp32_bytes:
        fixed = [table.name for table in tables if len(candidates[table.name]) == 1]
        because = f" with {', '.join(fixed[:5])}{' and others' if len(fixed) > 5 else ''} as asked for" if fixed else ""
        raise PackageError(
            f"--size-budget {size_budget:g}: the tables take {fp32_bytes:,} bytes in fp32 and at least {least:,} in "
            f"the smallest precisions{because}; the smallest budget is {_rounded_up(least / fp32_bytes)}"
        )
    return int(size_budget * fp32_bytes)


def _candidates(quantizer: QuantizerName) -> list[TableChoice]:
    return [TableChoice(precision, quantizer) for precision in PRECISIONS]


def _rounded_up(share: float) -> str:
    """Four digits that are not less."""
    return f"{-(-share * 1e4 // 1) / 1e4:.4f}"


def _log_mix(sensitivity: Sensitivity, chosen: Mapping[str, TableChoice], options: Options) -> None:
    comparison = sensitivity.compare(chosen)
    parts = sum(
        option.expected_increase
        for table, choice in chosen.items()
        for option in options[table]
        if option.precision == choice.precision
    )
    logger.info(
        "auto: AUC %.4f %% and NE %.4f %% of fp32's on %s samples; expected log loss grows by %.2e, by table %.2e",
        comparison.auc_ratio.value * 100,
        comparison.ne_ratio.value * 100,
        f"{comparison.num_samples:,}",
        sensitivity.expected_increase(chosen),
        parts,
    )
