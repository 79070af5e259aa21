"""Progress of long work as lines with a bar: a terminal redraws them in place, a log keeps one every few seconds."""

from __future__ import annotations

import re
import sys
import time
from typing import TextIO

from papilio.data_pipeline.terminal import format_duration

BAR_WIDTH = 20
MIN_BAR_WIDTH = 6
# A progress line, wherever it was printed: "#" is what a stream without block characters shows.
PROGRESS_BAR = re.compile(r"\|([ ▏▎▍▌▋▊▉█#]{4,})\|")
# What a line can do without when it does not fit: the first goes first. How fast and how long stay to the end.
DROPPED = (r"data wait ", r"(?!.*(samples/s|left$|^step |logloss|batches$))", r"logloss ", r"step |.*batches$")


def progress_bar(done: int, total: int, width: int = BAR_WIDTH) -> str:
    """Draw `done` of `total` as `|####    |  50 %`."""
    share = min(1.0, done / total) if total else 1.0
    filled = round(width * share)
    return f"|{'█' * filled}{' ' * (width - filled)}| {share:4.0%}"


def fit_progress_line(line: str, num_columns: int) -> str:
    """Return a progress line no longer than this: first its bar shrinks, then its least important parts go."""
    found = PROGRESS_BAR.search(line)
    if found is None or len(line) <= num_columns:
        return line
    label, bar = line[: found.start()].rstrip(), found[1]
    percent, *parts = re.split(r" {2,}", line[found.end() :].strip())
    for pattern in ("", *DROPPED):
        if pattern:
            parts = [part for part in parts if not re.match(pattern, part)]
        fixed = "  ".join([f"{label} || {percent}", *parts])
        room = num_columns - len(fixed)
        if room >= MIN_BAR_WIDTH:
            width = min(len(bar), room)
            filled = round(width * len(bar.rstrip()) / len(bar))
            return fixed.replace("||", f"|{bar[:1] * filled}{' ' * (width - filled)}|", 1)
    return "  ".join([f"{label} {percent}", *parts])[:num_columns]


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
        line = f"{label:<10} {progress_bar(done, total)}  {detail}  {format_duration(remaining_s)} left"
        print(line, file=self._stream, flush=True)
