"""Make a package of a run: one process, no GPU.

python -m papilio.trainer.inference.export.export_run --run RUN_DIR --output DIR
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence

from papilio.data_pipeline.errors import PapilioError, report_error
from papilio.sharding.reports.figures import size
from papilio.trainer.elastic.exit_codes import exit_in_order_on_signals
from papilio.trainer.inference.export.export_options import add_arguments, options_of
from papilio.trainer.inference.export.exporter import export_package
from papilio.trainer.inference.package.format import REPORT_PAGE, Package


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, and say what came of it."""
    parser = argparse.ArgumentParser(prog="papilio.trainer.inference.export.export_run", description=__doc__)
    add_arguments(parser)
    namespace = parser.parse_args(arguments)
    # By force: importing torch and FBGEMM has set up logging in ways of theirs.
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    exit_in_order_on_signals()
    begin_s = time.perf_counter()
    try:
        package = export_package(namespace.run, namespace.output, options_of(namespace))
    except PapilioError as error:
        return report_error("papilio export", error)
    except KeyboardInterrupt:
        print("papilio export: error: interrupted; nothing was written", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    print("\n".join(describe_export(package, namespace.output, time.perf_counter() - begin_s)))
    return 0


def describe_export(package: Package, output: str, seconds: float) -> list[str]:
    """Say what was made, where, and what to do with it."""
    manifest = package.manifest
    precisions = Counter(table.precision for table in manifest.tables)
    table_bytes = sum(table.num_bytes for table in manifest.tables)
    share = table_bytes / sum(table.fp32_bytes for table in manifest.tables)
    kinds = ", ".join(f"{number} in {precision}" for precision, number in precisions.most_common())
    plural = "s" if len(manifest.tables) > 1 else ""
    lines = [
        f"{output}: {size(manifest.num_bytes)} of {manifest.source.checkpoint} in {seconds:.1f} s",
        f"  {len(manifest.tables)} table{plural} ({kinds}): {size(table_bytes)}, {share:.1%} of their size in fp32",
    ]
    if manifest.certified is None:
        return [*lines, "  not certified (--no-gate): nobody has measured what it costs"]
    return [*lines, f"  {output}/{REPORT_PAGE} shows what was measured, and what each table costs at each precision"]


if __name__ == "__main__":
    sys.exit(main())
