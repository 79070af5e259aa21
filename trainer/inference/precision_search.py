"""Which precision each table gets, to meet a budget of bytes at the least measured loss (`--quantize auto`)."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.inference.gate import HeldOut
from trainer.inference.package import Package
from trainer.inference.table_writer import TableChoice
from trainer.inference.trained_model import TrainedModel


def choose(
    model: TrainedModel,
    reference: Package,
    held_out: HeldOut,
    *,
    size_budget: float,
    fixed: Mapping[str, TableChoice],
    quantizer: str,
    scratch: str,
) -> dict[str, TableChoice]:
    """Choose the precision of every table.

    Args:
        model: the trained model; `model.stream(table)` yields its rows.
        reference: a package with all tables in fp32.
        held_out: samples to measure the loss on.
        size_budget: bytes of all tables together, at most, as a share of their fp32 bytes.
        fixed: choices that the user made with --table; they count towards the budget and are returned as they are.
        quantizer: for the tables that get int4 or int2.
        scratch: an empty folder for temporary packages (see exporting.write_scratch_package); removed afterwards.

    Returns:
        A choice for every table of `model.tables`, by name.

    Raises:
        PackageError: the budget cannot be met; names the smallest that can.
    """
    raise NotImplementedError
