"""Measure this machine: `python -m papilio.trainer.calibration.calibrate --output FILE [--quick]`, a process a rank.

One run measures one number of ranks and adds it to the file; `papilio calibrate` runs several.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

import torch.distributed as dist

from papilio.data_pipeline.logging_setup import setup_logging
from papilio.sharding.calibration.collectives import UNLIMITED, measure_collectives
from papilio.sharding.calibration.kernels import KernelTiming, cases, fit_kernels, time_kernels
from papilio.sharding.calibration.overheads import OVERHEADS, StepTiming, fit_overheads, time_step
from papilio.sharding.calibration.profile_file import add_rates, hardware_from_values, write_hardware
from papilio.sharding.config import ShardingConfig
from papilio.sharding.hardware import RATE_NAMES, Hardware, HardwareError
from papilio.sharding.planner.job import Cluster
from papilio.trainer.calibration.dense import measure_dense, measure_memory
from papilio.trainer.calibration.shapes import CalibrationStep, calibration_steps
from papilio.trainer.calibration.synthetic import PlannedShape, Shape, SyntheticTraining, plan_shape
from papilio.trainer.elastic.exit_codes import exit_now
from papilio.trainer.elastic.health.job_health import job_health
from papilio.trainer.optimizers import CPU_SPARSE_OPTIMIZERS
from papilio.trainer.process_group import STALL_TIMEOUT_S, Ranks, process_group, rank_of_process
from papilio.trainer.run.measurement import process_memory_bytes
from papilio.trainer.runtime import configure_runtime, no_garbage_collection

# What is shown at the end, of the many figures in the file.
HEADLINES = {
    "memory_bytes_per_s": "memory, read and written in a row",
    "matmul_fp32_flops_per_s": "matrix products, fp32",
    "matmul_bf16_flops_per_s": "matrix products, bf16",
    "lookup_touch_32mib_bytes_per_s": "lookup, rows of a 32 MiB table",
    "lookup_touch_1gib_bytes_per_s": "lookup, rows of a 1 GiB table",
    "update_rowwise_adagrad_touch_32mib_bytes_per_s": "row-wise Adagrad, rows of a 32 MiB table",
    "update_rowwise_adagrad_touch_1gib_bytes_per_s": "row-wise Adagrad, rows of a 1 GiB table",
    "all_to_all_latency_s": "all-to-all, fixed time",
    "all_to_all_bytes_per_s": "all-to-all, bytes that a rank sends",
    "reduce_scatter_bytes_per_s": "reduce-scatter, bytes that a rank sends",
    "all_gather_bytes_per_s": "all-gather, bytes that a rank sends",
    "all_reduce_bytes_per_s": "all-reduce, bus bandwidth",
    "step_s": "fixed time of a step",
    "group_s": "fixed time of a sharding group",
    "row_group_s": "fixed time of a row-wise group, besides",
    "layer_s": "fixed time of a dense layer",
    "bag_s": "input distribution, each bag",
    "id_s": "input distribution, each id",
}

EXPECTED_ERRORS = (HardwareError,)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of every rank."""
    parser = argparse.ArgumentParser(prog="papilio.trainer.calibration.calibrate", description=__doc__)
    parser.add_argument("--output", required=True, help="TOML file to write or to add to")
    parser.add_argument("--quick", action="store_true", help="few and small measurements: to try, not to plan with")
    parser.add_argument("--fresh", action="store_true", help="begin the file anew")
    options = parser.parse_args(arguments)
    setup_logging("rank", rank_of_process())
    configure_runtime()
    # FBGEMM's dense kernel (data_parallel) says so at every first backward pass.
    warnings.filterwarnings("ignore", message=".*autograd kernel was not registered")
    try:
        with process_group() as ranks, job_health(ranks, STALL_TIMEOUT_S):
            hardware = calibrate(ranks, options.output, is_quick=options.quick, is_fresh=options.fresh)
            if ranks.is_first:
                print(describe(hardware, ranks.local_world_size), flush=True)
    except EXPECTED_ERRORS as error:
        print(f"papilio calibrate: error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def calibrate(ranks: Ranks, output: str, *, is_quick: bool, is_fresh: bool) -> Hardware:
    """Measure with these ranks busy, and add the figures to the file. Collective."""
    say = _Progress(ranks)
    with no_garbage_collection():
        framework_bytes = _framework_bytes(ranks)
        figures = _measure_parts(ranks, say, is_quick=is_quick)
        figures = ranks.agree_on(figures)  # fits differ in rounding; plans must not
        hardware = hardware_from_values(ranks.device.type, ranks.local_world_size, figures, framework_bytes)
        steps = calibration_steps(ranks.world_size, is_quick=is_quick)
        say(f"whole steps of {len(steps)} models")
        planned, timings = _time_steps(steps, hardware, ranks, is_quick=is_quick)
    figures = fit_overheads(timings, figures)
    measured = hardware_from_values(ranks.device.type, ranks.local_world_size, figures, framework_bytes)
    if ranks.is_first:
        print(_compare(steps, planned, timings, measured, ranks), flush=True)
        measured = measured if is_fresh else add_rates(output, measured)
        write_hardware(measured, output)
    dist.barrier(group=ranks.group)
    return measured


def _compare(
    steps: Sequence[CalibrationStep],
    planned: Sequence[PlannedShape],
    timings: Sequence[StepTiming],
    hardware: Hardware,
    ranks: Ranks,
) -> str:
    """Say how well the fitted figures give back the steps they were fitted to."""
    cluster = _cluster(hardware, ranks)
    lines, errors = [], []
    for step, found, timing in zip(steps, planned, timings, strict=True):
        predicted_s = found.predict(cluster).total_s
        errors.append(abs(math.log(predicted_s / timing.seconds)))
        lines.append(
            f"  {step.describe():<48} measured {1e3 * timing.seconds:8.2f} ms  fitted {1e3 * predicted_s:8.2f} ms"
        )
    return "\n".join([*lines, f"  the steps are given back to {math.expm1(statistics.fmean(errors)):.1%}"])


def _cluster(hardware: Hardware, ranks: Ranks) -> Cluster:
    return Cluster(hardware, ranks.world_size // ranks.local_world_size, ranks.local_world_size)


def _framework_bytes(ranks: Ranks) -> float:
    """Return what a rank holds before its model needs anything: once a model of next to nothing trains."""
    figures = dict.fromkeys(RATE_NAMES, 1.0)
    cluster = _cluster(hardware_from_values(ranks.device.type, ranks.local_world_size, figures, 0.0), ranks)
    shape = Shape((100,) * 4, (1,) * 4, bottom=(16,), top=(16,), global_batch_size=64)
    planned = cast(PlannedShape, plan_shape(shape, ShardingConfig(types=("table_wise",)), cluster))
    training = SyntheticTraining(shape, planned.plan, ranks)
    training.run(3)
    training.close()
    found = [0] * ranks.world_size
    dist.all_gather_object(found, process_memory_bytes(ranks.device), group=ranks.group)
    return float(max(found))


def _measure_parts(ranks: Ranks, say: _Progress, *, is_quick: bool) -> dict[str, float]:
    """Measure memory, kernels, collectives and the dense part; every rank at the same time, means over the ranks."""
    num_repeats = 3 if is_quick else 7
    say("memory")
    figures = {"memory_bytes_per_s": measure_memory(ranks.device, num_repeats), "host_memory_bytes_per_s": 0.0}
    optimizers = ("rowwise_adagrad",) if is_quick else CPU_SPARSE_OPTIMIZERS
    timings: dict[str, list[KernelTiming]] = {}
    for optimizer in optimizers:
        say(f"lookup and update with {optimizer}")
        timings[optimizer] = []
        for case in cases(optimizer, is_quick=is_quick):
            dist.barrier(group=ranks.group)
            timings[optimizer].append(_mean(time_kernels(optimizer, case, ranks.device, num_repeats), ranks))
    figures |= fit_kernels(timings)
    say("all-to-all, reduce-scatter, all-gather, all-reduce")
    figures |= measure_collectives(ranks.group, ranks.device, 10 if is_quick else 40)
    say("matrix products and interaction, fp32 and bf16")
    figures |= measure_dense(ranks, is_quick=is_quick)
    figures |= dict.fromkeys(OVERHEADS, 0.0)
    # On a CPU one core does everything in turn.
    figures["overlap"] = 0.5 if ranks.device.type == "cuda" else 0.0
    return figures


def _mean(timing: KernelTiming, ranks: Ranks) -> KernelTiming:
    found: list[KernelTiming] = [timing] * ranks.world_size
    dist.all_gather_object(found, timing, group=ranks.group)
    return KernelTiming(
        timing.case,
        statistics.fmean(other.lookup_s for other in found),
        statistics.fmean(other.update_s for other in found),
    )


def _time_steps(
    steps: Sequence[CalibrationStep], hardware: Hardware, ranks: Ranks, *, is_quick: bool
) -> tuple[list[PlannedShape], list[StepTiming]]:
    """Train each model for some windows in turn, so that a slow moment of the machine strikes all alike."""
    cluster = _cluster(hardware, ranks)
    planned = [cast(PlannedShape, plan_shape(step.shape, step.sharding, cluster)) for step in steps]
    trainings = [SyntheticTraining(found.shape, found.plan, ranks) for found in planned]
    seconds = time_in_turn(trainings, ranks, num_windows=2 if is_quick else 5, window_s=0.05 if is_quick else 0.2)
    for training in trainings:
        training.close()
    timings = []
    for found, measured_s in zip(planned, seconds, strict=True):
        predict = partial(_predict_s, found, ranks)
        timings.append(time_step(measured_s, hardware.rates[0].values(), predict))
    return planned, timings


def _predict_s(planned: PlannedShape, ranks: Ranks, figures: Mapping[str, float]) -> float:
    hardware = hardware_from_values(ranks.device.type, ranks.local_world_size, figures, 0.0)
    return planned.predict(_cluster(hardware, ranks)).total_s


def time_in_turn(
    trainings: Sequence[SyntheticTraining], ranks: Ranks, *, num_windows: int, window_s: float
) -> list[float]:
    """Return the median seconds of a step of each training, over windows in turn, after one to warm up. Collective."""
    num_steps = []
    for training in trainings:
        training.run(3)
        num_steps.append(ranks.agree_on(max(3, int(window_s / training.run(3)))))
    windows = [
        [training.run(count) for training, count in zip(trainings, num_steps, strict=True)] for _ in range(num_windows)
    ]
    return [statistics.median(times) for times in zip(*ranks.agree_on(windows), strict=True)]


def describe(hardware: Hardware, ranks_per_host: int) -> str:
    """Return a small table of what was measured with so many ranks."""
    entry = next(entry for entry in hardware.rates if entry.ranks_per_host == ranks_per_host)
    lines = [f"{ranks_per_host} rank(s) busy, {hardware.description}:"]
    for name, meaning in HEADLINES.items():
        figure = entry.figures.get(name)
        if figure is not None and 0 < figure.si < UNLIMITED:
            lines.append(f"  {meaning:<58} {figure.value:>8.4g} {figure.unit}")
    return "\n".join(lines)


class _Progress:
    """Says on rank 0 what is being measured, and since when."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._begin_s = time.perf_counter()

    def __call__(self, what: str) -> None:
        if self._ranks.is_first:
            elapsed_s = time.perf_counter() - self._begin_s
            print(f"[{elapsed_s:5.1f} s] {self._ranks.world_size} rank(s): {what}", flush=True)


if __name__ == "__main__":
    exit_now(main())
