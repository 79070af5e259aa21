"""One rank of `benchmarks.checkpoint_speed`: saves and loads, ours and stock DCP's, beside dd; prints lines of JSON."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.loading.loader import Loader
from papilio.data_pipeline.logging_setup import setup_logging
from papilio.sharding.runtime.table_shards import local_table_shards
from papilio.trainer.checkpoint.config import CheckpointConfig
from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.checkpoint.loader import load
from papilio.trainer.checkpoint.policy import Checkpoints, RunIdentity
from papilio.trainer.checkpoint.saver import Saver
from papilio.trainer.config_file import load_config
from papilio.trainer.optimizers import Optimizers
from papilio.trainer.process_group import Ranks, process_group
from papilio.trainer.runtime import configure_runtime
from papilio.trainer.sharded_model import ShardedModel, build_sharded_model

WARM_UP_STEPS, STEPS = 10, 40
MIB = 1 << 20


class Bench:
    """A model on this rank with its training steps, and the ways to save and load it."""

    def __init__(self, recipe: str, folder: str, ranks: Ranks) -> None:
        config = load_config(recipe)
        dataset = open_dataset(config.data.path)
        self.ranks = ranks
        self.folder = folder
        self.model: ShardedModel = build_sharded_model(config, dataset, ranks)
        self.optimizers = Optimizers(self.model.module, config.optimizer, config.schedule)
        size = config.train.global_batch_size
        loader = Loader(
            dataset,
            "train",
            config.data,
            global_batch_size=size,
            num_epochs=config.train.epochs,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        self._batches = iter(loader)
        self._pipeline = TrainPipelineSparseDist(
            self.model.module, self.optimizers.combined, ranks.device, execute_all_batches=True
        )
        self._step = 0
        # Stock DCP's async_save must not share a group with training.
        self.second_group = dist.new_group(backend="gloo")
        self.checkpoints = CheckpointFolder(os.path.join(folder, "papilio"))
        saving = CheckpointConfig(keep_last=1, keep_best=False)
        self.saver = Saver(self.checkpoints, saving, self.model, self.optimizers, ranks)
        self._policy = Checkpoints(self.saver, saving, RunIdentity({}, {}, {}), ranks)

    def step(self) -> float:
        """Train one step; return its seconds."""
        begin_s = time.perf_counter()
        self._pipeline.progress(self._batches)
        self._step += 1
        return time.perf_counter() - begin_s

    def save(self, *, wait: bool) -> None:
        """Save as training does."""
        self._policy.save(self._step, {"validations": []}, "benchmark", wait=wait)

    def load(self) -> None:
        """Load the newest."""
        load(self.checkpoints, self.checkpoints.committed_names()[-1], self.model, self.optimizers, self.ranks)

    def stock_state(self, *, with_optimizers: bool = True) -> dict[str, Any]:
        """What stock DCP is given."""
        state = {"model": self.model.module.state_dict()}
        return {**state, "optimizers": self.optimizers.combined.state_dict()} if with_optimizers else state

    def timed(self, function: Callable[[], Any]) -> float:
        """Seconds of a collective function, from when all ranks are there to when the last has ended."""
        dist.barrier()
        begin_s = time.perf_counter()
        function()
        dist.barrier()
        return time.perf_counter() - begin_s


def main() -> None:
    """Measure, or reshard; rank 0 prints."""
    job, recipe, folder, rounds = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    setup_logging("rank")
    configure_runtime()
    warnings.simplefilter("ignore")
    with process_group() as ranks:
        bench = Bench(recipe, folder, ranks)
        for entry in _measure(bench, rounds) if job == "measure" else _reshard(bench):
            if ranks.is_first:
                print(json.dumps(entry), flush=True)
        bench.saver.close()


def _measure(bench: Bench, rounds: int) -> Iterator[dict[str, Any]]:
    for _ in range(WARM_UP_STEPS):
        bench.step()
    num_bytes = _state_bytes(bench)
    variants = [_dd, _dd_of_two, _papilio, _dcp, _papilio_async, _dcp_async]
    for number in range(rounds):
        # Each round begins with another variant.
        for variant in variants[number % len(variants) :] + variants[: number % len(variants)]:
            yield {"round": number, "bytes": num_bytes, **variant(bench, num_bytes)}
    # For 4 ranks to load.
    bench.step()
    bench.save(wait=True)
    dcp.save(bench.stock_state(), storage_writer=FileSystemWriter(_stock_folder(bench)))


def _state_bytes(bench: Bench) -> int:
    own = 0
    for shard in local_table_shards(bench.model.module):
        own += sum(values.numel() * values.element_size() for values in (shard.weight, *shard.states.values()))
    return sum(bench.ranks.gather(own))


def _dd(bench: Bench, num_bytes: int) -> dict[str, Any]:
    return {"variant": "dd", **_dd_in_parallel(bench, num_bytes, 1)}


def _dd_of_two(bench: Bench, num_bytes: int) -> dict[str, Any]:
    return {"variant": "dd2", **_dd_in_parallel(bench, num_bytes, 2)}


def _dd_in_parallel(bench: Bench, num_bytes: int, num_processes: int) -> dict[str, Any]:
    """Copy as many bytes as a checkpoint has, in so many processes, to and from the disk."""
    paths = [os.path.join(bench.folder, f"dd_{number}") for number in range(num_processes)]
    count = num_bytes // num_processes // (16 * MIB)
    writing = [["dd", "if=/dev/zero", f"of={path}", "bs=16M", f"count={count}", "conv=fsync"] for path in paths]
    reading = [["dd", f"if={path}", "of=/dev/null", "bs=16M"] for path in paths]

    def run(commands: list[list[str]]) -> None:
        if bench.ranks.is_first:
            processes = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in commands]
            statuses = [process.wait() for process in processes]
            assert not any(statuses), commands

    figures: dict[str, Any] = {"write_s": bench.timed(lambda: run(writing))}
    _forget(bench, paths)
    figures["cold_read_s"] = bench.timed(lambda: run(reading))
    figures["warm_read_s"] = bench.timed(lambda: run(reading))
    _remove(bench, paths)
    return {**figures, "bytes": count * num_processes * 16 * MIB}


def _papilio(bench: Bench, num_bytes: int) -> dict[str, Any]:
    bench.step()
    with _Peak(bench) as peak:
        write_s = bench.timed(lambda: bench.save(wait=True))
    figures = {"variant": "papilio", "write_s": write_s, "extra_bytes": peak.extra_bytes}
    _forget(bench, [bench.checkpoints.path])
    with _Peak(bench) as peak:
        figures["cold_read_s"] = bench.timed(bench.load)
    figures["warm_read_s"] = bench.timed(bench.load)
    _remove(bench, [bench.checkpoints.path])
    return {**figures, "load_extra_bytes": peak.extra_bytes}


def _dcp(bench: Bench, num_bytes: int) -> dict[str, Any]:
    """Stock DCP as its tutorial has it, with fsync, which is its default."""
    path = _stock_folder(bench)

    def save() -> None:
        dcp.save(bench.stock_state(), storage_writer=FileSystemWriter(path))

    def read() -> None:
        dcp.load(bench.stock_state(), storage_reader=FileSystemReader(path))

    with _Peak(bench) as peak:
        write_s = bench.timed(save)
    figures = {"variant": "dcp", "write_s": write_s, "extra_bytes": peak.extra_bytes}
    _forget(bench, [path])
    with _Peak(bench) as peak:
        figures["cold_read_s"] = bench.timed(read)
    figures["warm_read_s"] = bench.timed(read)
    _remove(bench, [path])
    return {**figures, "load_extra_bytes": peak.extra_bytes}


def _papilio_async(bench: Bench, num_bytes: int) -> dict[str, Any]:
    def save() -> Callable[[], bool]:
        bench.save(wait=False)
        under_way = bench.saver._under_way
        assert under_way is not None
        return under_way.done

    figures = _beside_training(bench, save)
    bench.saver.check(wait=True)
    _remove(bench, [bench.checkpoints.path])
    return {"variant": "papilio_async", **figures}


def _dcp_async(bench: Bench, num_bytes: int) -> dict[str, Any]:
    """A writer of its own is the stager that works with TorchRec's tensors."""
    path = _stock_folder(bench)

    def save() -> Callable[[], bool]:
        writer = FileSystemWriter(path)
        future = dcp.async_save(bench.stock_state(), storage_writer=writer, process_group=bench.second_group)
        return future.done  # type: ignore[union-attr]

    try:
        figures = _beside_training(bench, save)
    except Exception as error:
        figures = {"error": f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0]}
    _remove(bench, [path])
    return {"variant": "dcp_async", **figures}


def _beside_training(bench: Bench, save: Callable[[], Callable[[], bool]]) -> dict[str, Any]:
    """Train, save on the way, and see what that does to the steps."""
    is_done = torch.zeros(1)

    def step() -> float:
        begin_s = time.perf_counter()
        bench.step()
        # The ranks end together; the question costs the steps before the save as much.
        dist.all_reduce(is_done, dist.ReduceOp.MIN)
        return time.perf_counter() - begin_s

    before_s = [step() for _ in range(STEPS)]
    with _Peak(bench) as peak:
        dist.barrier()
        begin_s = time.perf_counter()
        has_ended = save()
        stall_s = time.perf_counter() - begin_s
        meanwhile_s: list[float] = []
        is_done.zero_()
        while not is_done.item():
            is_done.fill_(has_ended())
            meanwhile_s.append(step())
        write_s = time.perf_counter() - begin_s - stall_s
    is_done.zero_()
    step_s = statistics.median(before_s)
    return {
        "stall_s": max(bench.ranks.gather(stall_s)),
        "write_s": write_s,
        "step_s": step_s,
        "step_meanwhile_s": statistics.median(meanwhile_s),
        "num_steps": len(meanwhile_s),
        "cost_s": stall_s + sum(meanwhile_s) - len(meanwhile_s) * step_s,
        "extra_bytes": peak.extra_bytes,
    }


def _reshard(bench: Bench) -> Iterator[dict[str, Any]]:
    """Load on more ranks and under another plan what `_measure` has left."""
    num_bytes = _state_bytes(bench)
    weights = sum(shard.weight.numel() * 4 for shard in local_table_shards(bench.model.module))
    num_weight_bytes = sum(bench.ranks.gather(weights))

    def read_stock() -> None:
        # Row-wise state under other blocks of columns is an error in stock DCP.
        dcp.load(bench.stock_state(with_optimizers=False), storage_reader=FileSystemReader(_stock_folder(bench)))

    cases = [("papilio", "weights and state", bench.load, num_bytes), ("dcp", "weights", read_stock, num_weight_bytes)]
    for name, what, read, needed in cases:
        before = _read_bytes()
        read_s = bench.timed(read)
        read_bytes = sum(bench.ranks.gather(_read_bytes() - before))
        figures = {"needed_bytes": needed, "read_bytes": read_bytes, "read_s": read_s}
        yield {"round": 0, "variant": f"{name}_reshard", "what": what, **figures}


class _Peak:
    """By how many bytes each rank's resident memory rose above what it was, at most; the kernel keeps the peak."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._before = 0
        self.extra_bytes: list[int] = []

    def __enter__(self) -> _Peak:
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
        self._before = _status_bytes("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self.extra_bytes = self._bench.ranks.gather(_status_bytes("VmHWM") - self._before)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _read_bytes() -> int:
    """Bytes that this process has read from files, whether they came from the disk or from memory."""
    lines = Path("/proc/self/io").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


def _stock_folder(bench: Bench) -> str:
    return os.path.join(bench.folder, "dcp")


def _forget(bench: Bench, paths: list[str]) -> None:
    """Ask the system to drop files, or all in folders, from memory."""
    dist.barrier()
    for path in paths if bench.ranks.is_first else []:
        for file in [found for found in Path(path).rglob("*") if found.is_file()] if os.path.isdir(path) else [path]:
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    dist.barrier()


def _remove(bench: Bench, paths: list[str]) -> None:
    dist.barrier()
    for path in paths if bench.ranks.is_first else []:
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif os.path.exists(path):
            os.unlink(path)
    dist.barrier()


if __name__ == "__main__":
    main()
