"""What keeps one rank's failure from becoming everyone's riddle: signs of life, a watchdog, and the first failure told.

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
from collections.abc import Iterator
from contextlib import contextmanager

from trainer.failures import WAIT_FOR_CAUSE_S, LostRankError, find_cause, is_loss_of_a_peer, note_own_failure
from trainer.ranks import Ranks
from trainer.side_channel import SideChannel, open_side_channel
from trainer.watchdog import Watchdog

# After an error a process may hang in the destructors of a group whose ranks are not all there.
EXIT_TIMEOUT_S = 10.0


class JobHealth:
    """What the training tells of itself."""

    def __init__(self, watchdog: Watchdog | None = None) -> None:
        """Without a watchdog nobody listens."""
        self._watchdog = watchdog

    def mark(self, step: int, phase: str = "training") -> None:
        """Say that this rank moves; costs a fraction of a microsecond.

        To be called after every step, and in long work without collectives (reading, planning, saving) at least every
        few minutes. Collectives count as moves by themselves.
        """
        if self._watchdog is not None:
            self._watchdog.mark(step, phase)


@contextmanager
def job_health(
    ranks: Ranks,
    stall_timeout_s: float,
    channel: SideChannel | None = None,
    exit_timeout_s: float | None = EXIT_TIMEOUT_S,
) -> Iterator[JobHealth]:
    """Watch this rank while the block runs; after an error say who failed first, and run no collective.

    Should the process then not end within `exit_timeout_s`, it is ended; None, for a process that means to live on.

    Raises:
        LostRankError: a collective failed because of another rank; in place of the collective's own error.
    """
    channel = open_side_channel() if channel is None else channel
    watchdog = Watchdog(ranks, stall_timeout_s, channel)
    watchdog.start()
    try:
        yield JobHealth(watchdog)
    except Exception as error:
        with _without_sigterm():
            _report(error, ranks, watchdog, channel, exit_timeout_s)
        raise
    finally:
        watchdog.end(has_failed=sys.exc_info()[0] is not None)


def _report(
    error: Exception, ranks: Ranks, watchdog: Watchdog, channel: SideChannel, exit_timeout_s: float | None
) -> None:
    if exit_timeout_s is not None:
        timer = threading.Timer(exit_timeout_s + WAIT_FOR_CAUSE_S, os._exit, [1])
        timer.daemon = True
        timer.start()
    if ranks.world_size == 1:
        return
    if is_loss_of_a_peer(error):
        raise LostRankError(find_cause(ranks, watchdog.step, channel)) from error
    line = note_own_failure(error, ranks, watchdog.step, channel)
    if line is not None:
        print(f"papilio: {line}", file=sys.stderr, flush=True)


@contextmanager
def _without_sigterm() -> Iterator[None]:
    """Ignore SIGTERM: the agent ends a host's other ranks after the first, and this one has something to say."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN) if is_main_thread else None
    try:
        yield
    finally:
        if is_main_thread:
            signal.signal(signal.SIGTERM, previous)
