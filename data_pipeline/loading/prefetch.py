"""Preparing ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

Item = TypeVar("Item")

STOP_CHECK_S = 0.05


class _End:
    """Put last: the source is exhausted, or raised `error`."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetch(source: Iterator[Item], num_ahead: int) -> Generator[Item, None, None]:
    """Iterate `source` in a thread that keeps `num_ahead` items ready.

    What `source` raises is raised here, after the items before it. Closing the generator ends the thread.
    """
    ready: queue.Queue[Item | _End] = queue.Queue(maxsize=num_ahead)
    is_stopped = threading.Event()
    thread = threading.Thread(target=_fill, args=(ready, source, is_stopped), name="papilio-prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        is_stopped.set()
        thread.join()


def _fill(ready: queue.Queue[Item | _End], source: Iterator[Item], is_stopped: threading.Event) -> None:
    error = None
    try:
        for item in source:
            if not _put(ready, item, is_stopped):
                return
    except BaseException as raised:  # handed over to the consumer, which raises it
        error = raised
    _put(ready, _End(error), is_stopped)


def _put(ready: queue.Queue[Item | _End], item: Item | _End, is_stopped: threading.Event) -> bool:
    while not is_stopped.is_set():
        try:
            ready.put(item, timeout=STOP_CHECK_S)
            return True
        except queue.Full:
            continue
    return False
