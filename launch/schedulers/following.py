"""Reads a log as it grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

POLL_S = 0.2
# The scheduler is asked seldom: it answers to everyone.
ASK_EVERY_S = 2.0


def follow_file(find: Callable[[], Path | None], is_growing: Callable[[], bool]) -> Iterator[str]:
    """Yield the lines of a file, with their newlines, until nobody adds to it; `find` gives it once it is there."""
    path, asked_s, goes_on = find(), time.monotonic(), is_growing()
    while path is None and goes_on:
        time.sleep(POLL_S)
        path = find()
        if time.monotonic() - asked_s > ASK_EVERY_S:
            asked_s, goes_on = time.monotonic(), is_growing()
    if path is None:
        return
    with path.open(encoding="utf-8", errors="replace") as log:
        pending = ""
        while True:
            piece = log.readline()
            pending += piece
            if pending.endswith("\n"):
                yield pending
                pending = ""
            elif not piece:
                if not goes_on:
                    break
                time.sleep(POLL_S)
                if time.monotonic() - asked_s > ASK_EVERY_S:
                    # What was written before the answer is read in another turn.
                    asked_s, goes_on = time.monotonic(), is_growing()
        if pending:
            yield pending + "\n"
