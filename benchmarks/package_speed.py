"""How fast a package is on a CPU, against the same model in fp32: lookups, the whole model, loading, shared memory.

    python -m benchmarks.package_speed [--shape large|small] [--threads 1] [--parts lookups model load] [--folder DIR]

Packages have random weights and are looked up by random ids, which is the hardest on caches. What is compared takes
turns in one process; a figure is the median over 7 rounds, each of at least 4 ms, after a warm-up.

    large   26 tables of 100k to 1M rows (10.3M), dim 64, bottom 13-512-256-64, top 415-1024-1024-512-256-1
    small   26 tables of 10k to 100k rows, dim 16, bottom 13-512-256-64-16, top 367-512-256-1
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping

import torch

from benchmarks.random_package import make_package
from papilio.data_pipeline.schema import CategoricalColumn, DenseColumn, Schema
from papilio.trainer.config import ModelConfig
from papilio.trainer.inference.backends.build_options import DENSE_ARITHMETICS
from papilio.trainer.inference.backends.cpu_backends import BACKENDS, run_of_model
from papilio.trainer.inference.backends.fastest import choose_ways, example_batches, time_ways
from papilio.trainer.inference.backends.flat_model import FP32_OUTPUT, TableLookup, build_flat_model
from papilio.trainer.inference.backends.predictor import RunGraph
from papilio.trainer.inference.package.format import Package, PackageError, read_package

SIZES = (1, 32, 256, 2048)
BAG_IDS = (1, 20)
PRECISIONS = ("fp32", "fp16", "int8", "int4")
NUM_TABLES, NUM_DENSE = 26, 13
SHAPES = {
    "large": (100_000, {"embedding_dim": 64, "dense_arch_layer_sizes": (512, 256)}, (1024, 1024, 512, 256)),
    "small": (10_000, {"embedding_dim": 16, "dense_arch_layer_sizes": (512, 256, 64)}, (512, 256)),
}
BASELINE = "fp32 tables, eager"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# fbgemm_gpu.split_embedding_configs.SparseType.BF16
BF16_OUTPUT = 5
NUM_PROCESSES = (1, 2, 4)
PARTS = ("lookups", "model", "load")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="large")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", help="where packages go, and are found again (default: a temporary one)")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: time on the processor, for a machine that is busy"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--private", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.basicConfig(level=logging.ERROR, force=True)
    warnings.simplefilter("ignore")
    if options.worker:
        _load_and_wait(options.worker, is_private=options.private)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = os.path.join(options.folder or temporary, options.shape)
        os.makedirs(folder, exist_ok=True)
        print(f"{options.shape}, {options.threads} thread(s), {options.clock} time, torch {torch.__version__}")
        print(_processor(), flush=True)
        parts = {"lookups": compare_lookups, "model": compare_models, "load": compare_loads}
        for part in options.parts:
            parts[part](folder, options)


def compare_lookups(folder: str, options: argparse.Namespace) -> None:
    """Print microseconds of FBGEMM's lookup of all tables: the operator alone, and with the check of ids before it."""
    lookups = {
        precision: build_flat_model(_package(folder, options.shape, precision)).lookup for precision in PRECISIONS
    }
    for lookup in lookups.values():
        lookup.weights[::4096].sum()
    print("\nlookups of all tables by one call, microseconds (in brackets: fp32's time over it)\n")
    print("| samples | ids a bag | " + " | ".join(_lookup_runs(lookups)) + " |")
    print("|---" * (len(PRECISIONS) + 4) + "|")
    package = _package(folder, options.shape, "int8")
    for bag_ids in BAG_IDS:
        # All packages have tables of the same rows.
        batches = {size: example_batches(package, size, bag_ids) for size in SIZES}
        times = time_ways(_lookup_runs(lookups), batches.__getitem__, SIZES, math.inf, CLOCKS[options.clock])
        for size in SIZES:
            cells = (f"{1e6 * s[size]:,.0f} ({times['fp32'][size] / s[size]:.2f})" for s in times.values())
            print(f"| {size} | {bag_ids} | {' | '.join(cells)} |", flush=True)


def _lookup_runs(lookups: Mapping[str, TableLookup]) -> dict[str, RunGraph]:
    runs = {precision: _operator(lookup, FP32_OUTPUT) for precision, lookup in lookups.items()}
    runs["int8, bf16 out"] = _operator(lookups["int8"], BF16_OUTPUT)
    runs["int8, ids checked"] = lambda dense, ids, lengths: (lookups["int8"](ids, lengths), dense)
    return runs


def _operator(lookup: TableLookup, output_dtype: int) -> RunGraph:
    """FBGEMM's operator on ids that are known to be sound; batches of one size have bags of one size."""
    offsets: dict[int, torch.Tensor] = {}

    def run(dense: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(lengths) not in offsets:
            offsets[len(lengths)] = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
        return lookup.call_operator(ids, offsets[len(lengths)], output_dtype), dense

    return run


def compare_models(folder: str, options: argparse.Namespace) -> None:
    """Print milliseconds of whole models by backend, and which backends would be chosen."""
    package, exact = _package(folder, options.shape, "int8"), _package(folder, options.shape, "fp32")
    runs = {BASELINE: run_of_model(build_flat_model(exact))}
    for name, backend in BACKENDS.items():
        missing_requirement = backend.missing_requirement()
        if missing_requirement is not None:
            print(f"{name} is left out: {missing_requirement}")
            continue
        built = os.path.join(folder, f"ways_{options.threads}", name)
        if not os.path.isdir(built):
            os.makedirs(built)
            begin_s = time.perf_counter()
            backend.build(package, built)
            print(f"  built {name} in {time.perf_counter() - begin_s:.1f} s", flush=True)
        runs[name] = backend.load(package, built)
    times = time_ways(runs, lambda size: example_batches(package, size), SIZES, math.inf, CLOCKS[options.clock])
    print("\nwhole model, one id a bag, milliseconds (in brackets: the baseline's time over it)\n")
    print("| backend | dense part | " + " | ".join(f"{size:,} samples" for size in SIZES) + " |")
    print("|---" * (len(SIZES) + 2) + "|")
    for name, found in times.items():
        cells = " | ".join(f"{1e3 * s:.3f} ({times[BASELINE][size] / s:.2f})" for size, s in found.items())
        print(f"| {name} | {BACKENDS[name].dense if name in BACKENDS else 'fp32'} | {cells} |")
    for place, coarsest in enumerate(DENSE_ARITHMETICS):
        allowed = {
            name: found
            for name, found in times.items()
            if name in BACKENDS and BACKENDS[name].dense in DENSE_ARITHMETICS[: place + 1]
        }
        print(f"chosen with --dense {coarsest}: {_describe_choice(allowed, times[BASELINE])}", flush=True)


def compare_loads(folder: str, options: argparse.Namespace) -> None:
    """Print what loading takes in fresh processes, and the memory of several at once."""
    package = _package(folder, options.shape, "int8")
    print(f"\nloading {package.manifest.num_bytes / 1e6:,.0f} MB in fresh processes that share the tables, or do not\n")
    print("| processes | tables | load, s | first answer, ms | RSS each, MB | PSS each, MB | PSS of all, MB |")
    print("|---|---|---|---|---|---|---|")
    for is_private in (False, True):
        for number in NUM_PROCESSES:
            found = _run_workers(package, number, options.threads, is_private=is_private)
            mean = {key: sum(one[key] for one in found) / number for key in found[0]}
            print(
                f"| {number} | {'private' if is_private else 'mapped'} | {max(one['load_s'] for one in found):.2f} | "
                f"{1e3 * mean['first_s']:.1f} | {mean['rss'] / 1e6:,.0f} | {mean['pss'] / 1e6:,.0f} | "
                f"{sum(one['pss'] for one in found) / 1e6:,.0f} |",
                flush=True,
            )


def _run_workers(package: Package, number: int, threads: int, *, is_private: bool) -> list[dict[str, float]]:
    """Let processes load the package, answer, and report their memory once all have answered."""
    command = [sys.executable, "-m", "benchmarks.package_speed", "--worker", package.folder, "--threads", str(threads)]
    command += ["--private"] * is_private
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(number)
    ]
    try:
        for worker in workers:
            _read_line(worker)
        found = []
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("report\n")
            worker.stdin.flush()
            found.append(json.loads(_read_line(worker)))
    finally:
        for worker in workers:
            worker.communicate("end\n", timeout=60)
    return found


def _read_line(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a worker ended with status {worker.wait()}")
    return line


def _load_and_wait(folder: str, *, is_private: bool) -> None:
    """Load, answer, touch all tables as a long life would, and report when told."""
    begin_s = time.perf_counter()
    package = read_package(folder)
    model = build_flat_model(package, is_mapped=not is_private)
    load_s = time.perf_counter() - begin_s
    run, (batch, *_) = run_of_model(model), example_batches(package, 32)
    begin_s = time.perf_counter()
    with torch.inference_mode():
        run(*batch)
    first_s = time.perf_counter() - begin_s
    model.lookup.weights[::4096].sum()
    assert "torchrec" not in sys.modules
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps({"load_s": load_s, "first_s": first_s, **_memory()}), flush=True)
    sys.stdin.readline()


def _memory() -> dict[str, float]:
    with open("/proc/self/smaps_rollup") as rollup:
        words = [line.split() for line in rollup]
    return {word[0].rstrip(":").lower(): int(word[1]) << 10 for word in words if word[0] in {"Rss:", "Pss:"}}


def _package(folder: str, shape: str, precision: str) -> Package:
    path = os.path.join(folder, precision)
    with contextlib.suppress(PackageError):
        return read_package(path)
    shutil.rmtree(path, ignore_errors=True)
    smallest_rows, layers, top = SHAPES[shape]
    rows = [int(smallest_rows * 10 ** (number / (NUM_TABLES - 1))) for number in range(NUM_TABLES)]
    schema = Schema(
        dense=tuple(DenseColumn(name=f"i{number}", transform="identity") for number in range(NUM_DENSE)),
        categorical=tuple(
            CategoricalColumn(name=f"c{number}", kind="integer", encoding="identity", num_buckets=count, multi_hot=True)
            for number, count in enumerate(rows)
        ),
    )
    record = {column.name: 0.5 for column in schema.dense} | {column.name: [3] for column in schema.categorical}
    model = ModelConfig.model_validate({**layers, "over_arch_layer_sizes": top})
    return make_package(path, schema, model, [record], precision=precision)  # type: ignore[arg-type]


def _describe_choice(times: Mapping[str, Mapping[int, float]], baseline: Mapping[int, float]) -> str:
    chosen = choose_ways(times)
    words = []
    for size in SIZES:
        backend = next(name for largest, name in chosen if size <= largest)
        words.append(f"{size}: {backend} {baseline[size] / times[backend][size]:.2f}x")
    return ", ".join(words)


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown processor")
    return f"{os.cpu_count()} x {name}"


if __name__ == "__main__":
    main()
