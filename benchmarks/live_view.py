"""What it costs to see a job while it runs: steps with and without, in turn, and each part by itself.

    python -m benchmarks.live_view [--rounds 15] [--steps 150] [--data DIR]

Two ranks of one thread train the Kaggle-like DLRM of benchmarks/training_step.py. In every other window of steps each
rank times its own work and puts the figures into its heartbeats, and rank 0 reads them and writes live.json. The parts
are what a thread or the step spends on each: medians over many calls, the reading also for 64 and 512 ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.rank_lines import run_ranks
from papilio.data_pipeline.logging_setup import setup_logging
from papilio.trainer.elastic.health.health_store import HealthStore
from papilio.trainer.elastic.health.heartbeat import Heartbeat, RankFigures
from papilio.trainer.elastic.health.live_writer import LiveWriter, Run, RunStatus
from papilio.trainer.elastic.health.step_timer import TIMED_EVERY_S, StepTimer
from papilio.trainer.elastic.health.watchdog import BEAT_S, Watchdog
from papilio.trainer.process_group import Ranks, process_group
from papilio.trainer.run_state import Progress
from papilio.trainer.runtime import configure_runtime, no_garbage_collection

GLOBAL_BATCH_SIZE = 2048
NUM_RANKS = 2
WARMUP_STEPS = 60
MANY = (2, 64, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=150, help="of a window; each round has two")
    parser.add_argument("--rows", type=int, default=400_000, help="rows to generate when --data is not given")
    parser.add_argument("--data", help="a generated data set of shape criteo")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or os.path.join(folder, "data")
        if options.data is None:
            command = ["generate", "--shape", "criteo", "--rows", str(options.rows), "--output", data]
            subprocess.run([sys.executable, "-m", "papilio.launch.cli", *command], check=True)
        words = ["--worker", "--data", data, "--rounds", str(options.rounds), "--steps", str(options.steps)]
        (found,) = run_ranks("benchmarks.live_view", words, NUM_RANKS)
    _print(found)


def _print(found: dict[str, Any]) -> None:
    ratios = [seen / unseen - 1 for seen, unseen in zip(found["seen_ms"], found["unseen_ms"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    step_ms = statistics.median(found["unseen_ms"])
    print(f"step {step_ms:.2f} ms; seen: {median:+.2%} (middle half of {len(ratios)} rounds {low:+.2%} to {high:+.2%})")
    print(f"not timed      {found['not_due_us']:8.1f} us a step            {found['not_due_us'] / step_ms / 10:.4f} %")
    shares = (
        ("timed", "due_us", TIMED_EVERY_S, "step"),
        ("figures", "figures_us", BEAT_S, "heartbeat"),
    )
    for name, key, every_s, what in shares:
        print(f"{name:<14} {found[key]:8.1f} us a {what}, every {every_s:4} s  {found[key] / every_s / 1e4:.4f} %")
    for num_ranks, (look_ms, every_s) in found["look_ms"].items():
        name = f"view of {num_ranks}"
        print(f"{name:<14} {look_ms:8.1f} ms a look, every {every_s:4} s  {look_ms / every_s / 10:.4f} %  (rank 0)")


def _work(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    setup_logging("rank")
    configure_runtime()
    with process_group() as ranks, tempfile.TemporaryDirectory() as folder:
        step, model = _make_step(options.data, ranks)
        health_store = HealthStore(dist.PrefixStore("live", dist.distributed_c10d._get_default_store()))
        watchdog = Watchdog(ranks, 600.0, health_store)
        watchdog.start()
        progress = Progress()
        work = StepTimer(model, ranks.device, progress)

        def count() -> None:
            progress.step += 1
            progress.num_samples += GLOBAL_BATCH_SIZE
            watchdog.mark(progress.step, "training")

        run = Run("benchmark", folder, NUM_RANKS, lambda: _status(progress))
        windows: dict[bool, list[float]] = {True: [], False: []}
        with no_garbage_collection():
            for _ in range(WARMUP_STEPS):
                step()
            for index in range(2 * options.rounds):
                is_seen = index % 4 in (0, 3)
                with _seen(ranks, run, health_store, watchdog, work) if is_seen else contextlib.nullcontext():
                    windows[is_seen].append(_window(step, count, work if is_seen else None, progress, options.steps))
        watchdog.end(has_failed=False)
        if ranks.is_first:
            found = {"seen_ms": windows[True], "unseen_ms": windows[False], **_parts(work, folder, progress)}
            print(json.dumps(found), flush=True)
        dist.barrier()


@contextlib.contextmanager
def _seen(ranks: Ranks, run: Run, health_store: HealthStore, watchdog: Watchdog, work: StepTimer) -> Iterator[None]:
    """Have figures in the heartbeats and a view of all ranks."""
    watchdog.show(work.figures)
    writer = LiveWriter(run, health_store, watchdog.heartbeat) if ranks.is_first else None
    if writer is not None:
        writer.start()
    yield
    if writer is not None:
        writer.close("done")
    watchdog._figures = None


def _window(
    step: Callable[[], object], count: Callable[[], None], work: StepTimer | None, progress: Progress, num_steps: int
) -> float:
    """Train a window; return milliseconds a step."""
    dist.barrier()
    begin_s = time.perf_counter()
    for _ in range(num_steps):
        now_s = time.perf_counter()
        with contextlib.nullcontext() if work is None else work.timed(now_s):
            step()
        count()
        progress.train_s += time.perf_counter() - now_s
    dist.barrier()
    return (time.perf_counter() - begin_s) / num_steps * 1e3


def _parts(work: StepTimer, folder: str, progress: Progress) -> dict[str, Any]:
    """Return what each part takes by itself, in the step or beside it."""

    def timed(now_s: float) -> None:
        with work.timed(now_s):
            pass

    parts: dict[str, Any] = {"not_due_us": _median_us(lambda: timed(-1.0), 20_000)}
    work._every_s = 0.0
    parts["due_us"] = _median_us(lambda: timed(time.perf_counter()), 500) + _hooks_us(work)
    parts["figures_us"] = _median_us(work.figures, 500)
    parts["look_ms"] = {num_ranks: _look_ms(num_ranks, folder, progress) for num_ranks in MANY}
    return parts


def _look_ms(num_ranks: int, folder: str, progress: Progress) -> tuple[float, float]:
    """Return what reading so many heartbeats and writing the view takes, and how often that is done."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    health_store = HealthStore(store)
    for rank in range(num_ranks):
        figures = RankFigures(1_234.5678, 12.3456, 1_000, 4.321, 9.876, (("t_C3", 0.41), ("t_C17", 0.2)))
        health_store.publish(
            Heartbeat(rank, f"host-{rank // 8}", 1_000, "training", 7_000, 9, 0.1, 1e9, figures=figures)
        )
    own = health_store.heartbeats(1)[0]
    writer = LiveWriter(Run("benchmark", folder, num_ranks, lambda: _status(progress)), health_store, lambda: own)
    return _median_us(lambda: writer._write(writer.look()), 30) / 1e3, writer._look_every_s


def _hooks_us(work: StepTimer) -> float:
    """Return what the hooks of all timed modules take when these are called."""
    module = torch.nn.Identity()
    bare_us = _median_us(lambda: module(None), 2_000)
    work._time(module, is_lookup=False)
    hooked_us = _median_us(lambda: module(None), 2_000)
    work._spans.clear()
    return (hooked_us - bare_us) * (len(work._lookups) + len(work._dense))


def _median_us(call: Callable[[], object], num_calls: int) -> float:
    times = []
    for _ in range(num_calls):
        begin_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin_s)
    return statistics.median(times) * 1e6


def _status(progress: Progress) -> RunStatus:
    return RunStatus(progress.step, 1 << 20, progress.num_samples, progress.train_s, 1, 1, 0.5, 0.4, None, None)


def _make_step(data: str, ranks: Ranks) -> tuple[Callable[[], object], torch.nn.Module]:
    """Return Papilio's step, reporting left out, and the sharded model."""
    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

    from papilio.data_pipeline.dataset import open_dataset
    from papilio.data_pipeline.loading.loader import Loader
    from papilio.trainer.config_file import build_config
    from papilio.trainer.optimizers import Optimizers
    from papilio.trainer.sharded_model import build_sharded_model

    tree = {
        "name": "benchmark",
        "data": {"path": data},
        "model": {"dense_arch_layer_sizes": [512, 256, 64], "over_arch_layer_sizes": [512, 256]},
        "sharding": {"types": ["table_wise"]},
        "train": {"precision": "bf16"},
    }
    config = build_config(tree, source="benchmark")
    dataset = open_dataset(data)
    loader = Loader(
        dataset,
        "train",
        config.data,
        global_batch_size=GLOBAL_BATCH_SIZE,
        num_epochs=1_000,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    model = build_sharded_model(config, dataset, ranks)
    optimizers = Optimizers(model.module, config.optimizer, config.schedule)
    pipeline = TrainPipelineSparseDist(model.module, optimizers.combined, ranks.device, execute_all_batches=True)
    batches = iter(loader)
    model.module.train()
    return lambda: pipeline.progress(batches), model.module


if __name__ == "__main__":
    main()
