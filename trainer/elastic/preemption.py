"""Preemption: SIGTERM announces that the host will be taken; all ranks agree on the step after which they save.

The handler only notes the time. Some times a second the ranks begin a tiny reduction after a step and read its result
after the next: so all learn of the signal after the same step, and nobody waits for the answer. How many steps lie
between two reductions follows from the slowest rank's step time, which is reduced too and thus the same on all ranks.
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

from papilio.trainer.elastic.exit_codes import RESUME_EXIT_CODE
from papilio.trainer.process_group import Ranks

# A reduction takes 0.1 ms of training time (2 gloo ranks, 2 cores of a Xeon, 2026-11-21): too much for every step.
QUESTION_INTERVAL_S = 0.25
MAX_STEPS_BETWEEN = 1_000

__all__ = ["RESUME_EXIT_CODE", "Preemption", "watch_for_preemption"]


class Preemption:
    """Whether this job was asked to stop, and whether all its ranks know."""

    def __init__(self, ranks: Ranks, group: dist.ProcessGroup | None) -> None:
        """`group` is a gloo group of all ranks and of nobody else's; None for a single rank."""
        self._ranks = ranks
        self._group = group
        self._question = torch.zeros(2, dtype=torch.float64)  # was there a signal? how long is a step, in seconds?
        self._pending: dist.Work | None = None
        self._num_steps_to_question = 1
        self._asked_s = time.perf_counter()
        self._num_steps_since = 0
        self.signal_unix_s: float | None = None

    def note_signal(self) -> None:
        """Note that this process was asked to stop, now."""
        if self.signal_unix_s is None:
            self.signal_unix_s = time.time()

    def is_agreed(self, step: int) -> bool:
        """Return whether to save and exit after this step, the same on all ranks. Collective, after every step."""
        is_agreed = self.signal_unix_s is not None if self._group is None else self._take_answer()
        if is_agreed and self._ranks.is_first:
            when = "" if self.signal_unix_s is None else f" {time.time() - self.signal_unix_s:.1f} s ago"
            print(f"asked to stop{when}: saving after step {step:,}, then exiting", flush=True)
        if not is_agreed and self._group is not None:
            self._ask_when_due(self._group)
        return is_agreed

    def end(self) -> None:
        """Take in the last answer, for which every rank has asked."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def _take_answer(self) -> bool:
        if self._pending is None:
            return False
        self.end()
        has_signal, step_s = self._question.tolist()
        self._num_steps_to_question = min(MAX_STEPS_BETWEEN, max(1, int(QUESTION_INTERVAL_S / step_s)))
        return bool(has_signal)

    def _ask_when_due(self, group: dist.ProcessGroup) -> None:
        self._num_steps_since += 1
        if self._num_steps_since < self._num_steps_to_question:
            return
        now_s = time.perf_counter()
        self._question[0] = self.signal_unix_s is not None
        self._question[1] = (now_s - self._asked_s) / self._num_steps_since
        self._asked_s, self._num_steps_since = now_s, 0
        self._pending = dist.all_reduce(self._question, dist.ReduceOp.MAX, group=group, async_op=True)


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
