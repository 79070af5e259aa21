"""What would pass: small, few changes, confirmed on all samples."""

import itertools

import pytest

from papilio.trainer.inference.export.feasible_mix import MAX_NAMED_TABLES, as_choice, export_options, find_feasible
from papilio.trainer.inference.export.quality_report import OptionFigures
from papilio.trainer.inference.package.format import RowError, TableEntry, row_bytes
from papilio.trainer.inference.package.table_writer import TableChoice

DIM = 16
# Loss of a table of weight 1 at each precision.
LOSSES = {"fp32": 0.0, "fp16": 1e-6, "int8": 1e-4, "int4": 1e-2, "int2": 0.3}


def table(name, rows, precision="int2"):
    return TableEntry(
        name=name,
        feature=name,
        rows=rows,
        dim=DIM,
        pooling="sum",
        precision=precision,
        quantizer="greedy" if precision in {"int4", "int2"} else None,
        offset=0,
        row_bytes=row_bytes(precision, DIM),
        row_error=RowError(),
    )


def options_of(entry, weight):
    return tuple(
        OptionFigures(
            precision=precision,
            quantizer={"int4": "greedy", "int2": "greedy", "int8": "minmax"}.get(precision),
            num_bytes=entry.rows * row_bytes(precision, DIM),
            expected_increase=weight * loss,
            measured_increase=0.0,
            measured_error=0.0,
            auc_change=0.0,
        )
        for precision, loss in LOSSES.items()
    )


TABLES = [table("t_a", 1_000), table("t_b", 5_000), table("t_c", 200), table("t_d", 9_000)]
WEIGHTS = {"t_a": 1.0, "t_b": 0.001, "t_c": 0.3, "t_d": 0.0002}
OPTIONS = {entry.name: options_of(entry, WEIGHTS[entry.name]) for entry in TABLES}


def loss_of(mix):
    return sum(WEIGHTS[name] * LOSSES[choice.precision] for name, choice in mix.items())


def bytes_of(mix):
    return sum(entry.rows * row_bytes(mix[entry.name].precision, DIM) for entry in TABLES)


def changed(mix):
    return {name: choice.precision for name, choice in mix.items() if choice.precision != "int2"}


@pytest.mark.parametrize("limit", [0.2, 0.05, 0.01, 0.002, 1e-4, 2e-6])
def test_the_mix_passes_with_few_changes(limit):
    found = find_feasible(
        TABLES,
        OPTIONS,
        screen=lambda mix: loss_of(mix) <= limit,
        confirm=lambda mix: "measured" if loss_of(mix) <= limit else None,
    )
    assert found.comparison == "measured"
    assert loss_of(found.choices) <= limit
    assert found.num_bytes == bytes_of(found.choices)
    # It is not larger than the smallest mix there is by more than a step of the budget, 1 / 256 of fp32's size.
    mixes = (
        dict(zip(OPTIONS, map(TableChoice, picked), strict=True))
        for picked in itertools.product(LOSSES, repeat=len(OPTIONS))
    )
    least = min(bytes_of(mix) for mix in mixes if loss_of(mix) <= limit)
    assert found.num_bytes <= least + sum(entry.fp32_bytes for entry in TABLES) / 256
    # Any one change taken back, it would not pass, or there is but one.
    for name in changed(found.choices):
        without = {**found.choices, name: TableChoice("int2", "greedy")}
        assert loss_of(without) > limit or len(changed(found.choices)) == 1


def test_one_bad_table_is_all_that_changes():
    found = find_feasible(
        TABLES,
        OPTIONS,
        screen=lambda mix: mix["t_c"].precision in {"fp16", "fp32"},
        confirm=lambda mix: "measured",
    )
    assert changed(found.choices).keys() <= {"t_a", "t_c"}
    assert found.choices["t_c"].precision in {"fp16", "fp32"}


def test_no_table_is_stored_worse_than_it_was():
    tables = [table("t_a", 1_000, "fp16"), table("t_b", 1_000)]
    options = {entry.name: options_of(entry, 1.0) for entry in tables}
    found = find_feasible(tables, options, screen=lambda mix: loss_of_all(mix) < 0.02, confirm=lambda mix: "measured")
    assert found.choices == {"t_a": TableChoice("fp16"), "t_b": TableChoice("int4", "greedy")}


def loss_of_all(mix):
    return sum(LOSSES[choice.precision] for choice in mix.values())


def test_what_passes_on_few_samples_only_is_not_told():
    limit = 0.001
    found = find_feasible(
        TABLES,
        OPTIONS,
        screen=lambda mix: loss_of(mix) <= 10 * limit,
        confirm=lambda mix: "measured" if loss_of(mix) <= limit else None,
    )
    assert loss_of(found.choices) <= limit


def test_when_not_even_fp32_passes_there_is_no_mix():
    tried = []
    assert find_feasible(TABLES, OPTIONS, screen=lambda mix: False, confirm=tried.append) is None
    assert {choice.precision for choice in tried[-1].values()} == {"fp32"}


def test_options_of_export_that_ask_for_a_mix():
    mix = {f"t_{name}": TableChoice("int2", "greedy") for name in "abc"} | {"t_d": TableChoice("fp16")}
    assert export_options(mix, 0.2) == "--quantize int2 --quantizer greedy --table t_d=fp16"
    assert export_options(dict.fromkeys(mix, TableChoice("int8")), 0.3) == "--quantize int8"


def test_a_mix_of_too_many_tables_to_name_is_asked_for_by_its_size():
    half = MAX_NAMED_TABLES + 1
    mix = {f"t_{n}": TableChoice("int8" if n < half else "fp16") for n in range(2 * half)}
    assert export_options(mix, 0.40001) == "--quantize auto --size-budget 0.401"


def test_a_measured_option_is_a_choice_of_the_same_kind():
    for option in OPTIONS["t_a"]:
        choice = as_choice(option)
        assert (choice.precision, choice.used_quantizer) == (option.precision, option.quantizer)
