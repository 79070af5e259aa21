"""Worker processes that die with their parent, fed a bounded number of tasks ahead, answering in order."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from papilio.data_pipeline.preprocess.bad_rows import PreprocessError

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
_TASKS_AHEAD = 2


class WorkPool:
    """A context manager; with one worker everything runs in this process."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> WorkPool:
        if self._num_workers > 1:
            # Spawned, not forked: the caller may have threads (pyarrow's, torch's).
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self._num_workers, context, initializer=_die_with_parent)
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def map_ordered(
        self, function: Callable[[_Task], _Result], tasks: Iterable[_Task], max_workers: int | None = None
    ) -> Iterator[_Result]:
        """Yield function(task) in the order of the tasks, at most `max_workers` at a time.

        Raises:
            PreprocessError: a worker was killed (out of memory, most likely).
        """
        if self._executor is None:
            yield from map(function, tasks)
            return
        tasks_ahead = self._num_workers + _TASKS_AHEAD if max_workers is None else min(max_workers, self._num_workers)
        waiting: deque[Future[_Result]] = deque()
        try:
            for task in tasks:
                with _without_sigint():
                    waiting.append(self._executor.submit(function, task))
                if len(waiting) >= tasks_ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise PreprocessError(
                "a worker process was killed, most likely out of memory; give the same command again with a "
                "smaller --num-workers: it continues where it stopped"
            ) from None


@contextmanager
def _without_sigint() -> Iterator[None]:
    """Start workers with Ctrl-C blocked, which on a terminal reaches them too: it is this process that ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _die_with_parent() -> None:
    """Exit when the parent is gone: killed, it cannot tell its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
