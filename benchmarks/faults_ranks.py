"""Ranks of `benchmarks.faults`: forked from a process that has imported everything, so that a start takes a second.

Each runs `papilio.trainer.train.main`, as under our agent, and notes in a log of its own what it trains: from which
checkpoint it went on, and for every step the numbers of the samples in its slice. The trainer knows nothing of it.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist
from torch import nn

import papilio.trainer.checkpoint.loader
import papilio.trainer.loop
import papilio.trainer.train
from benchmarks.faults_data import SAMPLE_SCALE
from papilio.data_pipeline.loading.batch import Batch
from papilio.trainer.checkpoint.saver import Saver
from papilio.trainer.reporting import Reporter

POLL_S = 0.005


@dataclass(frozen=True)
class Attempt:
    """One start of a job: arguments of `papilio.trainer.train`, ranks, and the prefix of the logs' names."""

    arguments: list[str]
    world_size: int
    log_prefix: str
    environment: dict[str, str]

    def samples_path(self, rank: int) -> str:
        """Log of what a rank trained."""
        return f"{self.log_prefix}_rank_{rank}.jsonl"

    def output_path(self, rank: int) -> str:
        """What a rank printed."""
        return f"{self.log_prefix}_rank_{rank}.txt"


class Zygote:
    """A process with everything imported and no thread, which forks ranks and reports how they ended."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_zygote, args=(theirs,))
        with _variable("OMP_NUM_THREADS", "1"):
            self._process.start()
        theirs.close()
        self._ended: dict[int, int] = {}
        # The rendezvous' store, as our agent holds it: it outlives the ranks.
        self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def start(self, attempt: Attempt) -> list[int]:
        """Start the ranks; returns their process ids."""
        self._ended = {}
        self._connection.send(attempt)
        while True:
            kind, content = self._connection.recv()
            if kind == "started":
                return list(content)

    def ended(self) -> dict[int, int]:
        """Exit statuses by process id, minus the signal's number, of the ranks that have ended."""
        while self._connection.poll():
            kind, (process_id, status) = self._connection.recv()
            assert kind == "ended"
            self._ended[process_id] = status
        return dict(self._ended)

    def close(self) -> None:
        """End the process, and with it any rank."""
        self._connection.close()
        self._process.join(30)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def rank_environment(store_port: int, job: str, world_size: int) -> dict[str, str]:
    """Return the variables that our agent would set for one round of a job on this host."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "PET_RDZV_ENDPOINT": f"localhost:{store_port}",
        "TORCHELASTIC_RUN_ID": job,
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _zygote(connection: Connection) -> None:
    gc.collect()
    gc.freeze()
    living: set[int] = set()
    try:
        while True:
            if connection.poll(POLL_S):
                attempt = connection.recv()
                started = []
                for rank in range(attempt.world_size):
                    process_id = os.fork()
                    if process_id == 0:
                        connection.close()
                        living.clear()
                        _be_rank(attempt, rank)
                    started.append(process_id)
                living.update(started)
                connection.send(("started", started))
            for process_id, status in _reap(living):
                connection.send(("ended", (process_id, status)))
    except EOFError:
        return
    finally:
        for process_id in living:
            os.kill(process_id, 9)


def _reap(living: set[int]) -> Iterator[tuple[int, int]]:
    for process_id in sorted(living):
        found, status = os.waitpid(process_id, os.WNOHANG)
        if found:
            living.discard(process_id)
            yield process_id, os.waitstatus_to_exitcode(status)


def _be_rank(attempt: Attempt, rank: int) -> None:
    """Be a rank, and end as `python -m papilio.trainer.train` would."""
    output = os.open(attempt.output_path(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(attempt.environment, RANK=str(rank), LOCAL_RANK=str(rank))
    _note_what_is_trained(attempt.samples_path(rank))
    sys.exit(papilio.trainer.train.main(attempt.arguments))


def _note_what_is_trained(path: str) -> None:
    """Write a line when all ranks have joined, for the checkpoint loaded, for the saver's mark, and for each step."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def note(**entry: Any) -> None:
        os.write(log, (json.dumps(entry) + "\n").encode())

    _note_loading(note)
    samples: list[list[int]] = []
    train = papilio.trainer.train.train

    def join_and_train(*arguments: Any) -> Any:
        note(joined=True)
        return train(*arguments)

    def note_batch(module: nn.Module, inputs: tuple[Batch]) -> None:
        if module.training:
            numbers = inputs[0].dense_features[: inputs[0].num_samples, 0] / SAMPLE_SCALE
            samples.append([round(number) for number in numbers.tolist()])

    run_training, record = papilio.trainer.loop.run_training, Reporter.record

    def run_and_note(run: Any, *arguments: Any) -> None:
        run.model.module.register_forward_pre_hook(note_batch)
        run_training(run, *arguments)

    def record_and_note(self: Reporter, output: Any, step: int) -> None:
        record(self, output, step)
        (trained,) = samples
        samples.clear()
        note(step=step, samples=trained)

    setattr(papilio.trainer.train, "train", join_and_train)  # noqa: B010  # as below
    setattr(papilio.trainer.train, "run_training", run_and_note)  # noqa: B010  # mypy forbids plain assignment
    setattr(Reporter, "record", record_and_note)  # noqa: B010  # as above


def _note_loading(note: Any) -> None:
    load, make_saver = papilio.trainer.checkpoint.loader.load, Saver.__init__

    def load_and_note(folder: Any, name: str, *arguments: Any) -> Any:
        marker = load(folder, name, *arguments)
        note(resumed=name)
        return marker

    def make_and_note(self: Saver, *arguments: Any) -> None:
        make_saver(self, *arguments)
        note(mark=self._attempt)

    setattr(papilio.trainer.checkpoint.loader, "load", load_and_note)  # noqa: B010  # mypy forbids plain assignment
    setattr(Saver, "__init__", make_and_note)  # noqa: B010  # as above
