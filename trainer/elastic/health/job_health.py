"""The entry point of a rank's health: heartbeats, a watchdog, and on every rank the cause of the first failure.

Used around a job, inside its process group:

    with process_group(stall_timeout_s) as ranks, job_health(ranks, stall_timeout_s) as health:
        ...
        health.mark(step, "training")
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from papilio.trainer.elastic.health.failures import (
    WAIT_FOR_CAUSE_S,
    LostRankError,
    find_cause,
    is_loss_of_a_peer,
    may_be_loss_of_a_peer,
    note_own_failure,
    one_line,
)
from papilio.trainer.elastic.health.health_store import HealthStore, open_health_store
from papilio.trainer.elastic.health.heartbeat import RankFigures
from papilio.trainer.elastic.health.live_writer import LiveWriter, Run
from papilio.trainer.elastic.health.watchdog import Watchdog
from papilio.trainer.process_group import Ranks

# After an error a process may hang in the destructors of a group whose ranks are not all there.
EXIT_TIMEOUT_S = 10.0


class JobHealth:
    """What the training reports of itself."""

    def __init__(self, watchdog: Watchdog | None = None, health_store: HealthStore | None = None) -> None:
        """Without a watchdog the reports go nowhere."""
        self._watchdog = watchdog
        self._health_store = health_store
        self._writer: LiveWriter | None = None
        self.is_saved = False

    def mark(self, step: int, phase: str = "training") -> None:
        """Note that this rank makes progress; costs a fraction of a microsecond.

        To be called after every step, and in long work without collectives (reading, planning, saving) at least every
        few minutes. Collectives count as moves by themselves.
        """
        if self._watchdog is not None:
            self._watchdog.mark(step, phase)

    def show(self, figures: Callable[[], RankFigures], run: Run | None) -> None:
        """Put this rank's figures into its heartbeats; with `run`, on one rank, write the view of all ranks too."""
        if self._watchdog is None or self._health_store is None:
            return
        if run is not None:
            self._writer = LiveWriter(run, self._health_store, self._watchdog.heartbeat)
            self._writer.start()
        self._watchdog.show(figures, self._close_with)

    def progress_note(self) -> str:
        """Return what of the other ranks is worth showing in the progress line; mostly nothing."""
        return "" if self._writer is None else self._writer.progress_note()

    def close(self, error: Exception | None) -> None:
        """End the view with how the job ended."""
        if self._writer is None or self._health_store is None:
            return
        if error is None:
            self._writer.close("saved" if self.is_saved else "done")
        else:
            self._close_with(one_line(error))

    def _close_with(self, line: str) -> None:
        first = self._health_store.first_failure() if self._health_store is not None else None
        if self._writer is not None:
            self._writer.close("failed", line if first is None else str(first))


@contextmanager
def job_health(
    ranks: Ranks,
    stall_timeout_s: float,
    health_store: HealthStore | None = None,
    exit_timeout_s: float | None = EXIT_TIMEOUT_S,
) -> Iterator[JobHealth]:
    """Watch this rank while the block runs; after an error report who failed first, and run no collective.

    Should the process then not end within `exit_timeout_s`, it is ended; None, for a process that means to live on.

    Raises:
        LostRankError: a collective failed because of another rank; in place of the collective's own error.
    """
    health_store = open_health_store() if health_store is None else health_store
    watchdog = Watchdog(ranks, stall_timeout_s, health_store)
    watchdog.start()
    health = JobHealth(watchdog, health_store)
    try:
        yield health
        health.close(None)
    except Exception as error:
        with _without_sigterm():
            lost = _report(error, ranks, watchdog, health_store, exit_timeout_s)
            health.close(lost or error)
        if lost is not None:
            raise lost from error
        raise
    finally:
        watchdog.end(has_failed=sys.exc_info()[0] is not None)


def _report(
    error: Exception, ranks: Ranks, watchdog: Watchdog, health_store: HealthStore, exit_timeout_s: float | None
) -> LostRankError | None:
    """Log and note what happened; return what to raise in place of the error, if that is another rank's."""
    if exit_timeout_s is not None:
        timer = threading.Timer(exit_timeout_s + WAIT_FOR_CAUSE_S, os._exit, [1])
        timer.daemon = True
        timer.start()
    if ranks.world_size == 1:
        return None
    if is_loss_of_a_peer(error) or may_be_loss_of_a_peer(error):
        cause = find_cause(error, ranks, watchdog.step, health_store)
        if cause is not None:
            return LostRankError(cause)
    line = note_own_failure(error, ranks, watchdog.step, health_store)
    if line is not None:
        print(f"papilio: {line}", file=sys.stderr, flush=True)
    return None


@contextmanager
def _without_sigterm() -> Iterator[None]:
    """Ignore SIGTERM: the agent ends a host's other ranks after the first, and this one has its error to report."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN) if is_main_thread else None
    try:
        yield
    finally:
        if is_main_thread:
            signal.signal(signal.SIGTERM, previous)
