"""Folders of work in progress: removed in the end whatever signal comes, and distinct from what a killed job left."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from papilio.trainer.storage.local_files import remove_local_folder

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def locked_folder(path: str) -> Iterator[str]:
    """Make a folder and hold a lock on it; it is removed in the end if it still has this name."""
    os.mkdir(path)
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(OSError):  # a network disk without locks: then leftovers on it stay
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path
        finally:
            os.close(lock)
    finally:
        with _uninterrupted():
            remove_local_folder(path)


def is_left_over(path: str) -> bool:
    """Whether nobody holds the lock on a folder of this kind, so that whoever made it was killed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked: the job is under way; or a disk without locks, where nobody can know
        return False
    finally:
        os.close(descriptor)
    return True


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let signals to end wait: a second Ctrl-C would otherwise leave half of a folder behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda received, _: came.append(received)) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    if came and before[signal.Signals(came[0])] is not signal.SIG_IGN:
        signal.raise_signal(came[0])
