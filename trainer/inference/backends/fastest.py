"""Format "fastest": for each batch size the fastest backend on this machine that keeps what the package promises.

An answer then depends a little on its batch: on the batch's size, since sizes have backends of their own and bf16
products add in another order (7e-4 of a probability was seen), and with int8 on the other samples, by which it is
rounded.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.manifest import DatasetError
from papilio.trainer.checks.same_data import check_data_of_package
from papilio.trainer.inference.backends import accuracy
from papilio.trainer.inference.backends.aoti import instruction_sets, require_fit, versions_needed
from papilio.trainer.inference.backends.build_options import DEFAULT_DENSE, DENSE_ARITHMETICS, DenseArithmetic
from papilio.trainer.inference.backends.cpu_backends import BACKENDS
from papilio.trainer.inference.backends.flat_model import build_flat_model
from papilio.trainer.inference.backends.format_folder import (
    BackendFigures,
    Choice,
    FormatInfo,
    Made,
    format_path,
    read_format,
    write_format,
)
from papilio.trainer.inference.backends.predictor import Predictor, RunGraph
from papilio.trainer.inference.export.held_out import HeldOut
from papilio.trainer.inference.package.format import Package, PackageError

logger = logging.getLogger(__name__)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
NUM_ROUNDS = 7
# A backend so much slower than the best, and more so than at the size before, is not tried at larger ones.
PRUNE_RATIO = 4.0
# A backend must be so much faster than that of the size below to take over: less is noise, and each costs memory.
WORTH_A_CHANGE = 0.97
_ROUND_S = 0.004
# Different batches that calls take in turn, so that not all rows are in the caches.
_LARGEST_VARIETY = 64
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def build_fastest(package: Package, data: str | None = None, dense: DenseArithmetic = DEFAULT_DENSE) -> FormatInfo:
    """Build all backends, measure what they cost and how fast they are, and keep those that are chosen.

    Args:
        package: what to build it for.
        data: data set with held-out samples; that of the run by default.
        dense: the coarsest arithmetic of the dense part that may be chosen.

    Raises:
        PackageError: accuracy cannot be measured, and more than fp32 was allowed.
    """
    held_out = None if dense == "fp32" else _held_out(package, data or package.manifest.source.data)

    def build(folder: str) -> Made:
        choice = _choose(package, folder, held_out, dense)
        for name in set(os.listdir(folder)) - {backend for _, backend in choice.up_to}:
            shutil.rmtree(os.path.join(folder, name))
        return Made(versions_needed(), instruction_sets(), choice)

    return write_format(package, "fastest", build)


def open_fastest(package: Package, *, trusts_formats: bool) -> Predictor:
    """Open the backends that were chosen.

    Raises:
        PackageError: it was not built, is damaged, is not trusted, or is for other versions or another processor.
    """
    info = read_format(package, "fastest", trusts_formats=trusts_formats, require_fit=require_fit)
    assert info.choice is not None
    up_to = info.choice.up_to
    unknown = sorted({backend for _, backend in up_to} - set(BACKENDS))
    if unknown:
        raise PackageError(
            f"format fastest of {package.folder} uses {unknown[0]}, which this Papilio does not know; `papilio package "
            f"build {package.folder} --format fastest` builds it anew"
        )
    if torch.get_num_threads() != info.choice.num_threads:
        logger.warning(
            "backends of %s were chosen with %d threads, here are %d: others may be faster",
            package.folder,
            info.choice.num_threads,
            torch.get_num_threads(),
        )
    runs = {
        backend: BACKENDS[backend].load(package, format_path(package, "fastest", backend))
        for backend in {name for _, name in up_to}
    }

    def run(dense: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num_samples = dense.shape[0]
        backend = next((name for largest, name in up_to if num_samples <= largest), up_to[-1][1])
        return runs[backend](dense, ids, lengths)

    return Predictor("fastest", package.manifest, run)


def _held_out(package: Package, data: str) -> HeldOut:
    try:
        dataset = open_dataset(data)
    except DatasetError as error:
        raise PackageError(
            f"arithmetic coarser than fp32 is measured on held-out data first, and there is none ({error}); name it "
            "with --data DIR, or build with --dense fp32, which changes no answer"
        ) from None
    check_data_of_package(package, dataset)
    return HeldOut.for_gate(dataset)


def _choose(package: Package, folder: str, held_out: HeldOut | None, dense: DenseArithmetic) -> Choice:
    model = build_flat_model(package)
    allowed = DENSE_ARITHMETICS[: DENSE_ARITHMETICS.index(dense) + 1]
    figures, runs = _build_ways(package, folder, allowed)
    if held_out is not None:
        rounded = {name: run for name, run in runs.items() if BACKENDS[name].dense != "fp32"}
        figures |= accuracy.measure(model, rounded, held_out, package.manifest)
        runs = {name: run for name, run in runs.items() if figures[name].refusal is None}
    # Of one thread, time on the processor: other work on this machine then does not decide.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = time_ways(runs, lambda num_samples: example_batches(package, num_samples), BATCH_SIZES, clock=clock)
    figures |= {
        name: figures[name].model_copy(update={"median_ms": {str(size): 1e3 * s for size, s in found.items()}})
        for name, found in times.items()
    }
    return Choice(
        up_to=tuple(choose_ways(times)),
        ways=figures,
        num_threads=torch.get_num_threads(),
        num_samples=held_out.num_samples if held_out is not None else 0,
        min_auc_ratio=accuracy.min_auc_ratio(package.manifest),
        held_out=held_out.describe() if held_out is not None else None,
    )


def _build_ways(
    package: Package, folder: str, allowed: Sequence[DenseArithmetic]
) -> tuple[dict[str, BackendFigures], dict[str, RunGraph]]:
    figures, runs = {}, {}
    for name, backend in BACKENDS.items():
        if backend.dense not in allowed:
            continue
        missing_requirement = backend.missing_requirement()
        figures[name] = BackendFigures(dense=backend.dense, refusal=missing_requirement)
        if missing_requirement is None:
            logger.info("building %s", name)
            os.mkdir(os.path.join(folder, name))
            backend.build(package, os.path.join(folder, name))
            runs[name] = backend.load(package, os.path.join(folder, name))
    return figures, runs


def time_ways(
    runs: Mapping[str, RunGraph],
    batches_of: Callable[[int], list[Inputs]],
    sizes: Sequence[int] = BATCH_SIZES,
    prune_ratio: float = PRUNE_RATIO,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[int, float]]:
    """Return the median seconds of a call, by backend and batch size. Backends take turns: all see the same machine."""
    times: dict[str, dict[int, float]] = {name: {} for name in runs}
    running, before = dict(runs), dict.fromkeys(runs, math.inf)
    for size in sizes:
        batches = batches_of(size)
        with torch.inference_mode():
            repeats = {name: _repeats(run, batches[0], clock) for name, run in running.items()}
            rounds = [
                {name: _time(run, batches, repeats[name], clock) for name, run in running.items()}
                for _ in range(NUM_ROUNDS)
            ]
        for name in running:
            times[name][size] = statistics.median(found[name] for found in rounds)
        best = min(times[name][size] for name in running)
        ratios = {name: times[name][size] / best for name in running}
        running = {name: running[name] for name, ratio in ratios.items() if ratio <= max(prune_ratio, before[name])}
        before = ratios
    return times


def choose_ways(times: Mapping[str, Mapping[int, float]]) -> list[tuple[int, str]]:
    """Return (largest batch size, backend) ascending, of the seconds by backend and batch size."""
    chosen: list[tuple[int, str]] = []
    for size in sorted({size for found in times.values() for size in found}):
        here = {name: found[size] for name, found in times.items() if size in found}
        best = min(here, key=lambda name: here[name])
        if chosen:
            before = chosen[-1][1]
            if before in here and here[best] > WORTH_A_CHANGE * here[before]:
                best = before
            if best == before:
                chosen.pop()
        chosen.append((size, best))
    return chosen


def example_batches(package: Package, num_samples: int, bag_ids: int = 1) -> list[Inputs]:
    """Return different batches of random inputs: ids anywhere in their tables, which is the hardest on caches."""
    generator = torch.Generator().manual_seed(num_samples)
    tables, num_dense = package.manifest.tables, len(package.manifest.dense_features)
    lengths = torch.full((len(tables) * num_samples,), bag_ids, dtype=torch.int32)
    batches = []
    for _ in range(max(2, min(_LARGEST_VARIETY, BATCH_SIZES[-1] // num_samples))):
        ids = [torch.randint(0, table.rows, (num_samples * bag_ids,), generator=generator) for table in tables]
        batches.append((torch.rand(num_samples, num_dense, generator=generator), torch.cat(ids).int(), lengths))
    return batches


def _repeats(run: RunGraph, batch: Inputs, clock: Callable[[], float]) -> int:
    """Warm a backend up and return how many calls make a round."""
    for _ in range(3):
        begin_s = clock()
        run(*batch)
        elapsed_s = clock() - begin_s
    return max(1, int(_ROUND_S / elapsed_s))


def _time(run: RunGraph, batches: list[Inputs], repeats: int, clock: Callable[[], float]) -> float:
    begin_s = clock()
    for number in range(repeats):
        run(*batches[number % len(batches)])
    return (clock() - begin_s) / repeats
