"""What to export and how; wrong choices are told before any work starts. Needs no torch."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from papilio.sharding.patterns import matches
from papilio.trainer.inference.package.format import PRECISIONS, PackageError, Precision, QuantizerName

AUTO = "auto"
QUANTIZERS: tuple[QuantizerName, ...] = ("minmax", "greedy", "least_squares")
# Precisions whose ranges are searched for; int8 gains at most 5 % from it.
SEARCHED_PRECISIONS: tuple[Precision, ...] = ("int4", "int2")
# Types that FBGEMM 1.8 has a name for and cannot do on a CPU (benchmarks of 2026-11).
_REFUSED = {
    "uint8": "FBGEMM cannot look up uint8 tables; int8 is what you mean: its codes are unsigned",
    "bf16": "FBGEMM's lookups of bf16 tables end the process with SIGFPE; fp16 has the same size and a smaller error",
    "fp8": "FBGEMM's lookups of fp8 tables have no scale by row: small weights vanish; int8 has the same size",
}
_ALIASES = {
    "bfloat16": "bf16",
    "quint8": "uint8",
    "float8": "fp8",
    "nfp8": "fp8",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
    "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8",
}
_SPELLINGS = {"float32": "fp32", "float16": "fp16", "half": "fp16", "qint8": "int8", "quint4x2": "int4"}


@dataclass(frozen=True)
class ExportOptions:
    """What `papilio export` takes.

    Attributes:
        checkpoint: name of a checkpoint, "latest" or "best".
        quantize: precision of all tables, or "auto".
        quantizer: how ranges of int4 and int2 rows are chosen.
        tables: (pattern, precision) for single tables; the last pattern that fits a table counts.
        size_budget: with "auto", bytes of all tables as a share of their fp32 bytes.
        data: folder of a data set with held-out samples; that of the run by default.
        min_auc_ratio: the package's AUC must be at least this share of the trained model's.
        has_gate: whether to certify at all.
    """

    checkpoint: str = "latest"
    quantize: str = "int8"
    quantizer: QuantizerName = "least_squares"
    tables: tuple[tuple[str, Precision], ...] = ()
    size_budget: float | None = None
    data: str | None = None
    min_auc_ratio: float = 0.999
    has_gate: bool = True

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            PackageError: one is not allowed, or they do not go together.
        """
        if self.quantize != AUTO:
            parse_precision("--quantize", self.quantize, (*PRECISIONS, AUTO))
        if self.quantizer not in QUANTIZERS:
            raise PackageError(f"--quantizer {self.quantizer}: choose one of {', '.join(QUANTIZERS)}")
        for _, precision in self.tables:
            parse_precision("--table", precision)
        if (self.quantize == AUTO) != (self.size_budget is not None):
            raise PackageError(
                "--quantize auto and --size-budget go together: the budget is the tables' size as a share of their "
                "fp32 size, for example --quantize auto --size-budget 0.2"
            )
        if self.size_budget is not None and not 0 < self.size_budget <= 1:
            raise PackageError(f"--size-budget {self.size_budget} must be above 0, and at most 1, the size of fp32")
        if self.quantize == AUTO and not self.has_gate:
            raise PackageError("--quantize auto measures on held-out data, so it cannot go without the gate")
        if not 0 <= self.min_auc_ratio <= 1:
            raise PackageError(f"--min-auc-ratio {self.min_auc_ratio} must be between 0 and 1, as 0.999")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `papilio export` takes."""
    default = ExportOptions()
    add = parser.add_argument
    add("--run", required=True, metavar="RUN_DIR", help="a run folder, or the folder of its checkpoints; also s3://...")
    add("--output", required=True, metavar="DIR", help="the package: a new folder on a local disk")
    add(
        "--quantize",
        default=default.quantize,
        metavar="PRECISION",
        help=f"of all tables: {', '.join(PRECISIONS)}, or auto, which meets --size-budget at the least measured loss "
        f"(default: {default.quantize})",
    )
    add("--size-budget", type=float, metavar="SHARE", help="with auto: size of all tables as a share of fp32's, as 0.2")
    add(
        "--quantizer",
        default=default.quantizer,
        metavar="NAME",
        help=f"how ranges of int4 and int2 rows are chosen: {', '.join(QUANTIZERS)} (default: {default.quantizer})",
    )
    add(
        "--table",
        action="append",
        default=[],
        metavar="PATTERN=PRECISION",
        help="precision of single tables, * and ? allowed; the last one that fits counts; may be given several times",
    )
    add("--data", metavar="DIR", help="data set with held-out samples and vocabularies (default: the run's)")
    add(
        "--min-auc-ratio",
        type=float,
        default=default.min_auc_ratio,
        metavar="SHARE",
        help="least AUC, as a share of the fp32 model's; the NE may be as much above (default: "
        f"{default.min_auc_ratio})",
    )
    add(
        "--checkpoint",
        default=default.checkpoint,
        metavar="NAME",
        help=f"a checkpoint's name, its step, latest or best (default: {default.checkpoint})",
    )
    add("--no-gate", action="store_true", help="write the package without measuring what it costs; it says so")


def options_of(namespace: argparse.Namespace) -> ExportOptions:
    """Return the options that were parsed.

    Raises:
        PackageError: one is not allowed, or they do not go together.
    """
    return ExportOptions(
        checkpoint=namespace.checkpoint,
        quantize=namespace.quantize,
        quantizer=namespace.quantizer,
        tables=tuple(parse_table_choice(word) for word in namespace.table),
        size_budget=namespace.size_budget,
        data=namespace.data,
        min_auc_ratio=namespace.min_auc_ratio,
        has_gate=not namespace.no_gate,
    )


def parse_precision(option: str, word: str, allowed: Sequence[str] = PRECISIONS) -> Precision:
    """Return the precision that a word names.

    Raises:
        PackageError: FBGEMM cannot do it, or there is none of that name.
    """
    if word in PRECISIONS:
        return word
    lower = word.lower()
    refused = _REFUSED.get(_ALIASES.get(lower, lower))
    if refused is not None:
        raise PackageError(f"{option} {word}: {refused}")
    nearest = [_SPELLINGS[lower]] if lower in _SPELLINGS else difflib.get_close_matches(lower, allowed, 1)
    fix = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(allowed)}"
    raise PackageError(f"{option} {word}: there is no such precision; {fix}")


def parse_table_choice(word: str) -> tuple[str, Precision]:
    """Return the pattern and the precision of PATTERN=PRECISION.

    Raises:
        PackageError: it is not of that form, or there is no such precision.
    """
    pattern, equals, precision = word.rpartition("=")
    if not equals or not pattern:
        raise PackageError(f"--table {word}: write PATTERN=PRECISION, for example --table 't_C1*=fp16'")
    return pattern, parse_precision(f"--table {pattern}=", precision)


def tables_by_pattern(choices: Sequence[tuple[str, Precision]], tables: Sequence[str]) -> dict[str, Precision]:
    """Return the precision of each table that a pattern fits; the last one that does counts.

    Raises:
        PackageError: a pattern fits no table; names the nearest.
    """
    found: dict[str, Precision] = {}
    for pattern, precision in choices:
        fitting = [table for table in tables if matches(table, pattern)]
        if not fitting:
            nearest = difflib.get_close_matches(pattern, tables, 5, cutoff=0.5) or tables[:5]
            more = ", ..." if len(tables) > len(nearest) else ""
            raise PackageError(
                f"--table {pattern}={precision}: no table has such a name; there are {', '.join(nearest)}{more}"
            )
        found |= dict.fromkeys(fitting, precision)
    return found
