"""How many copies of a model a machine should run, with how many threads, at which batch size: latency and throughput.

python -m benchmarks.colocation --output colocation/ [--seconds 1.0] [--rows-scale 0.25] [--shapes rmc1 rmc2 rmc3]

Copies (1, 2, 4) of a package run side by side, each a process that scores requests one after the other. Measured for
each batch size: latency percentiles over all copies' requests, and the samples that all copies score together per
second. With one thread a copy, tables are mapped and shared, or read into each copy's own memory. With two threads
OpenMP's threads wait for work as libgomp does by default, spinning, or passively. The machine must be idle otherwise.

Shapes are those that the DeepRecSys benchmark publishes for Facebook's RMC1, RMC2 and RMC3 (models/configs of
github.com/harvard-acc/DeepRecSys; Gupta et al., arXiv 1906.03109 and 2001.02772), with dot products for interaction
and int8 tables. `--rows-scale` makes tables smaller than published, which suits smaller machines.

"others" are cores that other processes kept busy meanwhile: rows where they are much above 0 say little.
Writes results.jsonl and colocation.html (a figure a shape) to the output folder, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.colocation_chart import LIMITS_MS, MAX_OTHER_CORES, best_within, words_on_disturbance, write_page
from benchmarks.random_package import make_package
from papilio.data_pipeline.progress import Progress
from papilio.data_pipeline.schema import CategoricalColumn, DenseColumn, Schema
from papilio.trainer.config import ModelConfig

COPIES = (1, 2, 4)
BATCH_SIZES = (1, 16, 64, 256)
# (threads a copy, how OpenMP's threads wait, weights)
VARIANTS = ((1, "passive", "shared"), (1, "passive", "private"), (2, "passive", "shared"), (2, "spin", "shared"))
WAITS: dict[str, dict[str, str]] = {"passive": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}, "spin": {}}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """A model: dense inputs, hidden layers, tables and ids of each bag."""

    num_dense: int
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    num_tables: int
    rows: int
    dim: int
    ids_per_bag: int
    words: str


SHAPES = {
    "rmc1": Shape(128, (64,), (256, 64), 8, 4_000_000, 32, 80, "small MLPs, 8 tables, 80 lookups each"),
    "rmc2": Shape(
        256, (128,), (128, 64), 32, 500_000, 64, 120, "small MLPs, 32 tables, 120 lookups each: memory-bound"
    ),
    "rmc3": Shape(2560, (1024, 256), (512, 256), 10, 2_000_000, 32, 20, "large MLPs, 10 tables, 20 lookups each"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--rows-scale", type=float, default=0.25, help="of the published rows of each table")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--copies", nargs="+", type=int, default=list(COPIES))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=list(BATCH_SIZES))
    parser.add_argument("--passes", type=int, default=2, help="tries to measure a set undisturbed by other processes")
    parser.add_argument("--draw-only", action="store_true", help="draw results.jsonl of an earlier run again")
    options = parser.parse_args()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    results = output / "results.jsonl"
    if not options.draw_only:
        for rows in measure_all(options):
            results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    write_page(rows, {name: shape.words for name, shape in SHAPES.items()}, output / "colocation.html")
    print("\n".join(tables_of(rows)))
    print(words_on_disturbance(rows))


def measure_all(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Measure every set of copies of every shape, and again those that were disturbed by other processes.

    Yields:
        The rows after each pass, each the least disturbed one of its kind so far.
    """
    found: dict[tuple[Any, ...], Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        sets = [
            each
            for name in options.shapes
            for each in sets_of(name, write_shape(f"{folder}/{name}", SHAPES[name], options.rows_scale), options.copies)
        ]
        for _ in range(options.passes):
            num_rows = len(sets) * len(options.batch_sizes)
            with Progress("measuring", num_rows, "rows", is_shown=True, is_kept=False) as progress:
                for row in measure_sets(sets, options.batch_sizes, options.seconds):
                    key = (*_set_key(row), row["batch_size"])
                    if key not in found or row["other_cores"] < found[key]["other_cores"]:
                        found[key] = row
                    progress.advance(1)
            disturbed = {_set_key(row) for row in found.values() if row["other_cores"] > MAX_OTHER_CORES}
            sets = [each for each in sets if _set_key(each) in disturbed]
            yield list(found.values())
            if not sets:
                break


def _set_key(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("shape", "copies", "threads", "waits", "weights"))


def sets_of(name: str, package: str, all_copies: list[int]) -> list[Row]:
    """Return the sets of copies of a shape."""
    common = {"shape": name, "package": package, "ids_per_bag": SHAPES[name].ids_per_bag}
    return [
        {**common, "copies": copies, "threads": threads, "waits": waits, "weights": weights}
        for copies in all_copies
        for threads, waits, weights in VARIANTS
    ]


def write_shape(folder: str, shape: Shape, rows_scale: float) -> str:
    """Write a package of a shape."""
    rows = max(1000, int(shape.rows * rows_scale))
    column: dict[str, Any] = {"multi_hot": True, "kind": "integer", "encoding": "identity", "num_buckets": rows}
    schema = Schema(
        dense=tuple(DenseColumn(name=f"d{i}", transform="identity") for i in range(shape.num_dense)),
        categorical=tuple(CategoricalColumn(name=f"c{i}", **column) for i in range(shape.num_tables)),
    )
    model = ModelConfig(embedding_dim=shape.dim, dense_arch_layer_sizes=shape.bottom, over_arch_layer_sizes=shape.top)
    make_package(folder, schema, model, [{"d0": 1.0, "c0": [5, 7]}])
    return folder


def measure_sets(sets: list[Row], batch_sizes: list[int], seconds: float) -> Iterable[Row]:
    """Yield the rows of sets, measured by one process for each wait policy, which has it in its environment."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    for waits, environment in WAITS.items():
        of_waits = [each for each in sets if each["waits"] == waits]
        if not of_waits:
            continue
        job = json.dumps({"sets": of_waits, "batch_sizes": batch_sizes, "seconds": seconds})
        command = [sys.executable, "-m", "benchmarks.colocation_worker", job]
        with subprocess.Popen(command, env=clean | environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
        if process.returncode:
            raise RuntimeError(f"the copies ended with status {process.returncode}")


def tables_of(rows: list[Row]) -> list[str]:
    """Return what was measured, and the best within each limit, as Markdown."""
    lines = [
        "| shape | copies | threads | waits | weights | batch | samples/s | p50 ms | p95 ms | p99 ms | MiB | others |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row['shape']} | {row['copies']} | {row['threads']} | {row['waits'] if row['threads'] > 1 else '-'} | "
            f"{row['weights']} | {row['batch_size']} | {row['samples_per_s']:,.0f} | {row['p50_ms']:.2f} | "
            f"{row['p95_ms']:.2f} | {row['p99_ms']:.2f} | {row['memory_mib']:,.0f} | "
            f"{row['other_cores']:.2f} |"
        )
    lines += ["", "| shape | p99 at most | samples/s | with |", "|---|---|---|---|"]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        for limit_ms in LIMITS_MS:
            best = best_within([row for row in rows if row["shape"] == shape], limit_ms)
            if best is not None:
                lines.append(f"| {shape} | {limit_ms:g} ms | {best['samples_per_s']:,.0f} | {words_of(best)} |")
    return lines


def words_of(row: Row) -> str:
    """Say how a row was measured."""
    waits = f", {row['waits']} waits" if row["threads"] > 1 else ""
    plural = ("y", "ies")[row["copies"] > 1]
    return (
        f"{row['copies']} cop{plural} of {row['threads']} thread{'s' * (row['threads'] > 1)}{waits}, "
        f"{row['weights']} weights, batch {row['batch_size']}"
    )


if __name__ == "__main__":
    main()
