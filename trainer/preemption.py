"""Preemption: SIGTERM says that the host will be taken; all ranks agree on the step after which they save and leave.

The handler only notes the time. After every step the ranks reduce one number, and read the sum of the step before: so
all learn of the signal after the same step, and nobody waits for the answer.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from trainer.exit_codes import RESUME_EXIT_CODE
from trainer.ranks import Ranks

__all__ = ["RESUME_EXIT_CODE", "Preemption", "watch_for_preemption"]


class Preemption:
    """Whether this job was told to end, and whether all its ranks know."""

    def __init__(self, ranks: Ranks, group: dist.ProcessGroup | None) -> None:
        """`group` is a gloo group of all ranks and of nobody else's; None for a single rank."""
        self._ranks = ranks
        self._group = group
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None
        self.signal_unix_s: float | None = None

    def note_signal(self) -> None:
        """Note that this process was told to end, now."""
        if self.signal_unix_s is None:
            self.signal_unix_s = time.time()

    def is_agreed(self, step: int) -> bool:
        """Return whether to save and leave after this step, the same on all ranks. Collective, after every step.

        A signal is acted upon one step after the step in which it came, or two.
        """
        if self._group is None:
            return self.signal_unix_s is not None
        if self._pending is not None:
            self._pending.wait()
            if self._flag.item():
                self._pending = None
                return True
        self._flag.fill_(self.signal_unix_s is not None)
        self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return False

    def end(self) -> None:
        """Take in the last answer, for which every rank has asked."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None


@contextmanager
def watch_for_preemption(ranks: Ranks) -> Iterator[Preemption]:
    """Watch for SIGTERM while the block runs; in the main thread, and the handler before is put back. Collective.

    After an error the last answer is not waited for: some rank may never have asked.
    """
    group = dist.new_group(backend="gloo") if ranks.world_size > 1 else None
    preemption = Preemption(ranks, group)

    def note(number: int, frame: FrameType | None) -> None:
        preemption.note_signal()

    is_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, note) if is_main_thread else None
    try:
        yield preemption
        preemption.end()
    finally:
        if is_main_thread:
            signal.signal(signal.SIGTERM, previous)
    if group is not None:
        dist.destroy_process_group(group)
