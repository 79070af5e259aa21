"""Wrong choices for an export are told at once, with what to write instead."""

import argparse

import pytest

from papilio.trainer.inference.export.export_options import (
    ExportOptions,
    add_arguments,
    options_of,
    parse_table_choice,
    tables_by_pattern,
)
from papilio.trainer.inference.package.format import PackageError

TABLES = ["t_C1", "t_C2", "t_C10", "t_user", "t_item"]


def parse(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return options_of(parser.parse_args(["--run=r", "--output=o", *words]))


def test_what_is_not_said_has_defaults():
    assert parse() == ExportOptions()
    assert ExportOptions() == ExportOptions("latest", "int8", "least_squares", (), None, None, 0.999, True)


def test_everything_can_be_said():
    words = ["--quantize=auto", "--size-budget=0.2", "--quantizer=greedy", "--data=d", "--min-auc-ratio=0.99"]
    options = parse(*words, "--checkpoint=best", "--table=t_*=int4", "--table=t_C1=fp16")
    expected = ExportOptions("best", "auto", "greedy", (("t_*", "int4"), ("t_C1", "fp16")), 0.2, "d", 0.99)
    assert options == expected
    assert parse("--no-gate") == ExportOptions(has_gate=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quantize=bf16"], "--quantize bf16: FBGEMM's lookups of bf16 tables end the process with SIGFPE; fp16 has"),
        (["--quantize=bfloat16"], "--quantize bfloat16: FBGEMM's lookups of bf16 tables end"),
        (["--quantize=uint8"], "--quantize uint8: FBGEMM cannot look up uint8 tables; int8 is what you mean"),
        (["--quantize=float8_e4m3fn"], "--quantize float8_e4m3fn: FBGEMM's lookups of fp8 tables have no scale by row"),
        (["--quantize=float16"], "--quantize float16: there is no such precision; did you mean fp16?"),
        (["--quantize=in4"], "--quantize in4: there is no such precision; did you mean int4?"),
        (
            ["--quantize=x"],
            "--quantize x: there is no such precision; choose one of fp32, fp16, int8, int4, int2, auto",
        ),
        (["--quantizer=best"], "--quantizer best: choose one of minmax, greedy, least_squares"),
        (["--table=t_C1"], "--table t_C1: write PATTERN=PRECISION, for example --table 't_C1*=fp16'"),
        (["--table==int8"], "--table =int8: write PATTERN=PRECISION"),
        (["--table=t_C1=bf16"], "--table t_C1= bf16: FBGEMM's lookups of bf16 tables end"),
        (
            ["--table=t_C1=auto"],
            "--table t_C1= auto: there is no such precision; choose one of fp32, fp16, int8, int4, int2",
        ),
        (["--quantize=auto"], "--quantize auto and --size-budget go together"),
        (["--size-budget=0.2"], "--quantize auto and --size-budget go together: the budget is the tables' size as a"),
        (["--quantize=auto", "--size-budget=0"], "--size-budget 0.0 must be above 0, and at most 1, the size of fp32"),
        (["--quantize=auto", "--size-budget=1.5"], "--size-budget 1.5 must be above 0"),
        (
            ["--quantize=auto", "--size-budget=0.2", "--no-gate"],
            "--quantize auto measures on held-out data, so it cannot",
        ),
        (["--min-auc-ratio=99.9"], "--min-auc-ratio 99.9 must be between 0 and 1, as 0.999"),
        (["--min-auc-ratio=nan"], "--min-auc-ratio nan must be between 0 and 1"),
    ],
)
def test_wrong_choices_are_refused(words, message):
    with pytest.raises(PackageError) as error:
        parse(*words)
    assert str(error.value).startswith(message)


def test_the_last_pattern_that_fits_a_table_counts():
    choices = [parse_table_choice(word) for word in ("t_C*=int4", "t_C1=fp16", "t_[iu]*=int2")]
    expected = {"t_C1": "fp16", "t_C2": "int4", "t_C10": "int4", "t_user": "int2", "t_item": "int2"}
    assert tables_by_pattern(choices, TABLES) == expected
    # A feature may have "=" in its name.
    assert parse_table_choice("t_a=b=int8") == ("t_a=b", "int8")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("t_usr", "--table t_usr=int8: no table has such a name; there are t_user, ..."),
        ("zzz*", "--table zzz*=int8: no table has such a name; there are t_C1, t_C2, t_C10, t_user, t_item"),
    ],
)
def test_a_pattern_that_fits_nothing_is_refused(pattern, message):
    with pytest.raises(PackageError) as error:
        tables_by_pattern([(pattern, "int8")], TABLES)
    assert str(error.value) == message
