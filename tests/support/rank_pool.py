"""Real ranks for tests: worker processes with a gloo group, that run functions of test modules on every rank."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

TIMEOUT_S = 240


class RankPool:
    """`world_size` processes that live as long as the test session; a failed call replaces them.

    With a `local_world_size` of fewer ranks they believe to be on several hosts.
    """

    def __init__(self, world_size: int, local_world_size: int | None = None) -> None:
        self.world_size = world_size
        self.local_world_size = local_world_size or world_size
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(ranks, *arguments)` on every rank and return the results by rank."""
        if not self._workers:
            self._start()
        for _, connection in self._workers:
            connection.send((function, arguments))
        ranks = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        answers: dict[int, Any] = {}
        # Any rank may be the first to fail, and the others then wait for it in a collective.
        while len(answers) < self.world_size:
            waiting = [connection for connection, rank in ranks.items() if rank not in answers]
            ready = wait(waiting, TIMEOUT_S)
            if not ready:
                self._fail(f"no answer in {TIMEOUT_S} s from ranks {[ranks[connection] for connection in waiting]}")
            for connection in ready:
                try:
                    kind, answers[ranks[connection]] = connection.recv()
                except EOFError:
                    self._fail(f"rank {ranks[connection]} died")
                if kind == "error":
                    self._fail(answers[ranks[connection]])
        return [answers[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes."""
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers = []

    def _fail(self, message: str) -> NoReturn:
        self.close()
        raise AssertionError(message)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, self.world_size, self.local_world_size, str(store))
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            self._workers.append((process, ours))


def _work(connection: Connection, rank: int, world_size: int, local_world_size: int, store: str) -> None:
    # TorchRec reads from it which ranks share a host.
    os.environ["LOCAL_WORLD_SIZE"] = str(local_world_size)
    import torch
    import torch.distributed as dist

    from papilio.trainer.process_group import Ranks

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    ranks = Ranks(rank, world_size, rank % local_world_size, local_world_size, torch.device("cpu"), dist.group.WORLD)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("ok", function(ranks, *arguments)))
        except BaseException:
            connection.send(("error", f"rank {rank}:\n{traceback.format_exc()}"))
