"""Progress of long work as lines with a bar: a terminal redraws them in place, a log keeps one every few seconds."""

from __future__ import annotations

import sys
import time
from typing import TextIO

BAR_WIDTH = 20


def progress_bar(done: int, total: int, width: int = BAR_WIDTH) -> str:
    """Draw `done` of `total` as `|####    |  50 %`."""
    share = min(1.0, done / total) if total else 1.0
    filled = round(width * share)
    return f"|{'█' * filled}{' ' * (width - filled)}| {share:4.0%}"


class ProgressPrinter:
    """Prints a line at most every `interval_s` seconds; silent on ranks other than the first."""

    def __init__(self, interval_s: float, *, is_silent: bool, num_done: int = 0, stream: TextIO | None = None) -> None:
        """`num_done` was done before, by another process: it says nothing of how fast this one is."""
        self._interval_s = interval_s
        self._num_done = num_done
        self._is_silent = is_silent
        self._stream = stream or sys.stdout
        self._begin_s = time.perf_counter()
        self._last_s = self._begin_s

    def print(self, label: str, done: int, total: int, detail: str) -> None:
        """Show `done` of `total` with `detail`, if it is time to, or if the work is done."""
        now_s = time.perf_counter()
        if self._is_silent or (now_s - self._last_s < self._interval_s and done < total):
            return
        self._last_s = now_s
        remaining_s = (now_s - self._begin_s) / max(1, done - self._num_done) * (total - done)
        line = f"{label:<10} {progress_bar(done, total)}  {detail}  {duration(remaining_s)} left"
        print(line, file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """Write seconds for people: "12 s", "3 min 05 s", "2 h 07 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
