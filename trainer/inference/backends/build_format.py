"""Build a format of a package: one process, no GPU.

python -m papilio.trainer.inference.backends.build_format DIR --format fastest
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
import warnings
from collections.abc import Sequence

from papilio.data_pipeline.errors import PapilioError, report_error
from papilio.sharding.reports.figures import size
from papilio.trainer.elastic.exit_codes import exit_in_order_on_signals
from papilio.trainer.inference.backends.build_options import DEFAULT_DENSE, add_arguments
from papilio.trainer.inference.backends.format_folder import Choice, FormatInfo
from papilio.trainer.inference.backends.opening import build_format
from papilio.trainer.inference.package.format import FORMATS, read_package

SHOWN_SIZES = ("1", "32", "256", "2048")


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, and say what came of it."""
    parser = argparse.ArgumentParser(prog="papilio.trainer.inference.backends.build_format", description=__doc__)
    parser.add_argument("package", metavar="DIR")
    add_arguments(parser)
    namespace = parser.parse_args(arguments)
    # Compilers and exporters have much to say that is not for whoever builds a package.
    logging.basicConfig(level=logging.ERROR, format="%(message)s", force=True)
    logging.getLogger("papilio.trainer").setLevel(logging.INFO)
    warnings.simplefilter("ignore")
    exit_in_order_on_signals()
    begin_s = time.perf_counter()
    try:
        package = read_package(namespace.package)
        info = build_format(
            package,
            namespace.format,
            data=namespace.data,
            dense=namespace.dense or DEFAULT_DENSE,
            num_threads=namespace.threads,
        )
    except PapilioError as error:
        return report_error("papilio package build", error)
    except KeyboardInterrupt:
        print("papilio package build: error: interrupted; nothing was changed", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    print("\n".join(describe_format(info, namespace.package, time.perf_counter() - begin_s)))
    return 0


def describe_format(info: FormatInfo, package: str, seconds: float) -> list[str]:
    """Say what was built, and of a choice what it rests on."""
    num_bytes = size(sum(file.num_bytes for file in info.files.values()))
    head = f"{package}/{FORMATS}/{info.name}: {num_bytes} in {seconds:.1f} s"
    return [head, *(describe_choice(info.choice) if info.choice is not None else [])]


def describe_choice(choice: Choice) -> list[str]:
    """Show the backends with their figures and the batch sizes that each is chosen for."""
    measured_on = f"; AUC on {choice.held_out}" if choice.held_out is not None else ""
    plural = "s" if choice.num_threads > 1 else ""
    lines = [f"  median ms of a call with {choice.num_threads} thread{plural}, by batch size{measured_on}"]
    lines.append(f"  {'backend':<18}" + "".join(f"{column:>9}" for column in SHOWN_SIZES) + "    AUC kept   chosen for")
    ranges: dict[str, list[str]] = {name: [] for name in choice.ways}
    smallest = 1
    for largest, backend in choice.up_to:
        is_last = largest == choice.up_to[-1][0]
        ranges[backend].append(f"{smallest} and more" if is_last else f"{smallest} to {largest}")
        smallest = largest + 1
    for name, figures in choice.ways.items():
        times = "".join(
            f"{figures.median_ms[column]:>9.3f}" if column in figures.median_ms else f"{'-':>9}"
            for column in SHOWN_SIZES
        )
        kept = "exact" if figures.auc_ratio is None else f"{figures.auc_ratio:.4%}"
        lines.append(f"  {name:<18}{times}{kept:>12}   {figures.refusal or ', '.join(ranges[name])}".rstrip())
    return lines


if __name__ == "__main__":
    sys.exit(main())
