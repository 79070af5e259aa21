"""What would pass the gate: a small mix of precisions that is measured to, with few tables changed, none for worse."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from papilio.trainer.inference.export.assignment import Choice, assign
from papilio.trainer.inference.export.quality_report import Comparison, OptionFigures
from papilio.trainer.inference.export.sensitivity import is_stored_so
from papilio.trainer.inference.package.format import PRECISION_BITS, TableEntry
from papilio.trainer.inference.package.table_writer import TableChoice

Choices = Mapping[str, TableChoice]
# The budget of bytes is halved in so often: the mix is within 1 / 256 of fp32's size of the smallest.
NUM_HALVINGS = 8
# On the whole of the held-out samples, each further half the way to all tables in fp32.
NUM_CONFIRMATIONS = 4
MAX_NAMED_TABLES = 40


@dataclass(frozen=True)
class Mix:
    """A mix that passes, as measured on the held-out samples."""

    choices: dict[str, TableChoice]
    num_bytes: int
    comparison: Comparison


def find_feasible(
    tables: Sequence[TableEntry],
    options: Mapping[str, Sequence[OptionFigures]],
    *,
    screen: Callable[[Choices], bool],
    confirm: Callable[[Choices], Comparison | None],
) -> Mix | None:
    """Return the smallest mix that passes.

    Args:
        tables: as they are packaged.
        options: what each table costs at each precision, those that it is packaged with and fp32 included.
        screen: says whether a mix passes on few samples.
        confirm: measures a mix on all held-out samples; None if it does not pass.

    Returns:
        The mix; None if not even tables in fp32 pass, so that they are not what is wrong.
    """
    wider = {table.name: _not_below(table, options[table.name]) for table in tables}
    low, high = 0, sum(table.fp32_bytes for table in tables)
    for _ in range(NUM_HALVINGS):
        middle = (low + high) // 2
        mix = cheapest_mix(wider, middle)
        low, high = (low, middle) if mix is not None and screen(mix) else (middle, high)
    tried = [_fewest_changes(tables, _mix(wider, high), options, screen)]
    for _ in range(NUM_CONFIRMATIONS):
        tried.append(_mix(wider, high))
        high = (high + sum(table.fp32_bytes for table in tables)) // 2
    for mix in [*tried, {table.name: TableChoice("fp32") for table in tables}]:
        comparison = confirm(mix)
        if comparison is not None:
            return Mix(mix, _num_bytes(mix, wider), comparison)
    return None


def _mix(options: Mapping[str, Sequence[OptionFigures]], budget_bytes: int) -> dict[str, TableChoice]:
    mix = cheapest_mix(options, budget_bytes)
    assert mix is not None
    return mix


def _fewest_changes(
    tables: Sequence[TableEntry],
    mix: Choices,
    options: Mapping[str, Sequence[OptionFigures]],
    screen: Callable[[Choices], bool],
) -> dict[str, TableChoice]:
    """Return the mix with only as many tables changed as it needs to pass, those that gain most."""

    def gain(table: TableEntry) -> float:
        costs = {option.precision: option.expected_increase for option in options[table.name]}
        return costs[table.precision] - costs[mix[table.name].precision]

    ordered = sorted(tables, key=gain, reverse=True)
    packaged = {
        table.name: choice
        for table in tables
        for choice in map(as_choice, options[table.name])
        if is_stored_so(table, choice)
    }

    def first(number: int) -> dict[str, TableChoice]:
        return packaged | {table.name: mix[table.name] for table in ordered[:number]}

    too_few, enough = 0, len(tables)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if screen(first(middle)) else (middle, enough)
    return first(enough)


def cheapest_mix(options: Mapping[str, Sequence[OptionFigures]], budget_bytes: int) -> dict[str, TableChoice] | None:
    """Return the choices whose measured losses have the least sum within a budget; None if nothing fits."""
    tables = list(options)
    costs = [[Choice(option.num_bytes, option.expected_increase) for option in options[table]] for table in tables]
    found = assign(costs, budget_bytes)
    if found is None:
        return None
    return {table: as_choice(options[table][pick]) for table, pick in zip(tables, found.picks, strict=True)}


def as_choice(option: OptionFigures) -> TableChoice:
    """Return what was measured as a choice."""
    if option.quantizer is None:
        return TableChoice(option.precision)
    return TableChoice(option.precision, option.quantizer)


def export_options(mix: Choices, size_share: float) -> str:
    """Return the options of `papilio export` that ask for a mix."""
    common = Counter(choice.precision for choice in mix.values()).most_common(1)[0][0]
    others = [f"--table {name}={choice.precision}" for name, choice in mix.items() if choice.precision != common]
    if len(others) > MAX_NAMED_TABLES:
        return f"--quantize auto --size-budget {math.ceil(size_share * 1e3) / 1e3:g}"
    quantizers = {choice.quantizer for choice in mix.values() if PRECISION_BITS[choice.precision] < 8}
    chosen = [f"--quantizer {quantizers.pop()}"] if len(quantizers) == 1 else []
    return " ".join([f"--quantize {common}", *chosen, *others])


def _not_below(table: TableEntry, options: Sequence[OptionFigures]) -> list[OptionFigures]:
    kept = [option for option in options if option.num_bytes >= table.num_bytes]
    return [option for option in kept if option.num_bytes > table.num_bytes or is_stored_so(table, as_choice(option))]


def _num_bytes(mix: Choices, options: Mapping[str, Sequence[OptionFigures]]) -> int:
    return sum(
        option.num_bytes
        for table, choice in mix.items()
        for option in options[table]
        if option.precision == choice.precision
    )
