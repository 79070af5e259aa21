"""The verbs that make data sets: from the command line's arguments to the options of data_pipeline."""

from __future__ import annotations

import argparse
import errno
import logging
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from papilio.data_pipeline.generate.generate_options import GenerateOptions
from papilio.data_pipeline.generate.generator import generate
from papilio.data_pipeline.manifest import MANIFEST_NAME, DatasetError, Manifest
from papilio.data_pipeline.preprocess.engine import preprocess
from papilio.data_pipeline.preprocess.preprocess_options import PreprocessOptions
from papilio.data_pipeline.terminal import fold
from papilio.launch.given_options import build_options, given_options
from papilio.launch.usage import UsageError, require_files

SHOWN_COLUMNS = 80
MAX_SHOWN_WARNINGS = 12


def run_preprocess(namespace: argparse.Namespace) -> int:
    """Preprocess raw files into a data set."""
    given = given_options(namespace)
    require_files("--input", given["inputs"])
    if given["source"] == "table" and "schema_path" not in given:
        raise UsageError("--source table needs --schema FILE, which names the label, dense and categorical columns")
    require_files("--schema", [given["schema_path"]] if "schema_path" in given else [])
    options = build_options(PreprocessOptions, given, {"inputs": "--input", "schema_path": "--schema"})
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with _naming_output(options.output):
        manifest = preprocess(options)
    print(summarize(options.output, manifest))
    return 0


def run_generate(namespace: argparse.Namespace) -> int:
    """Generate a data set."""
    options = build_options(GenerateOptions, given_options(namespace), {"num_rows": "--rows"})
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with _naming_output(options.output):
        manifest = generate(options)
    print(summarize(options.output, manifest))
    return 0


@contextmanager
def _naming_output(output: str) -> Iterator[None]:
    """Say in one line what the system refused: most likely to write the output.

    Raises:
        DatasetError: in place of the system's error.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        path = error.filename or output
        fix = "give another --output"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free some and give the same command again, or another --output"
        raise DatasetError(f"{path}: {error.strerror or error}; {fix}") from error


def summarize(folder: str, manifest: Manifest) -> str:
    """What a data set holds, a line a split; the best possible metrics are known for generated data only."""
    lines = [f"{folder}: {manifest.num_rows:,} rows; split: {manifest.split_rule}"]
    if manifest.num_bad_rows:
        lines[0] += f"; {manifest.num_bad_rows:,} malformed rows set aside"
    for name, split in manifest.splits.items():
        line = f"  {name:10}  {split.num_rows:>13,} rows  label rate {split.label_rate:.4f}"
        if split.best_auc is not None and split.best_logloss is not None:
            line += f"  best possible AUC {split.best_auc:.4f}, logloss {split.best_logloss:.4f}"
        lines.append(line)
    folded = [fold(line, 4) for line in lines]
    return "\n".join([*folded, *_warning_lines(folder, manifest.warnings)])


def _warning_lines(folder: str, warnings: tuple[str, ...]) -> list[str]:
    """As many as one reads, broken at SHOWN_COLUMNS; all are in the manifest."""
    lines: list[str] = []
    for warning in warnings[:MAX_SHOWN_WARNINGS]:
        lines += textwrap.wrap(f"warning: {warning}", SHOWN_COLUMNS, subsequent_indent="  ")
    if len(warnings) > MAX_SHOWN_WARNINGS:
        rest = f"warning: and {len(warnings) - MAX_SHOWN_WARNINGS:,} more, in {folder}/{MANIFEST_NAME}"
        lines += textwrap.wrap(rest, SHOWN_COLUMNS, subsequent_indent="  ")
    return lines
