"""What a failing storage operation leads to: another try after a pause, or an error that names the fix."""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")
logger = logging.getLogger(__name__)

# What passes by itself: a server that restarts, a network that drops, a soft NFS mount that timed out (EIO, ESTALE).
TRANSIENT_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.EIO,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.EREMOTEIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
_PERMISSION = "give this user the right to it, or choose another folder"
_FULL = "free space there, or choose a folder on another disk"
FIXES = {
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "the disk is mounted read-only; choose another folder",
    errno.ENOSPC: _FULL,
    errno.EDQUOT: "the quota of this user is used up; free space there, or choose a folder on another disk",
    errno.EFBIG: "the file is larger than the disk or `ulimit -f` allows; raise the limit, or choose another folder",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file, not a folder; correct the path",
    errno.EISDIR: "the path is a folder, not a file; correct the path",
    errno.ELOOP: "links lead in a circle; correct the path",
    errno.ENAMETOOLONG: "the name is too long for the disk; choose a shorter path",
    errno.EIO: "look at the disk (`dmesg`), or choose another folder",
}


class StorageError(OSError):
    """An operation on stored bytes that failed for good: which, where, how often it was tried, and what fixes it."""

    def __init__(self, message: str, number: int | None = None, *, is_transient: bool | None = None) -> None:
        """`number` is the errno, where there is one; `is_transient`: as the storage says, or else as the errno does."""
        super().__init__(message)
        self.errno = number
        self.is_transient = number in TRANSIENT_ERRNOS if is_transient is None else is_transient

    @property
    def is_passing(self) -> bool:
        """Whether the same may go well another time: the storage answers again, or somebody frees space."""
        return self.is_transient or self.errno in FULL_ERRNOS

    def __reduce__(self) -> tuple[Callable[..., StorageError], tuple[str, int | None, bool]]:
        """Keep the errno on the way to other ranks, which OSError loses."""
        return _rebuilt, (str(self), self.errno, self.is_transient)


def _rebuilt(message: str, number: int | None, is_transient: bool) -> StorageError:
    return StorageError(message, number, is_transient=is_transient)


class TryAgainError(OSError):
    """What was stored is not what was sent, so the whole operation is worth another try."""


@dataclass(frozen=True)
class StorageFailure:
    """What an exception of a storage means."""

    reason: str
    fix: str
    is_transient: bool
    errno: int | None = None


@dataclass(frozen=True)
class RetryPolicy:
    """How often, and after which pauses, an operation that failed for a transient reason is tried.

    The pauses double from `first_wait_s` to `max_wait_s`, each shortened at random by up to a half, so that the ranks
    of a job do not come back all at once. They come to half a minute at most with the values given here. `random` is
    the system's, so that no seeded generator moves.
    """

    num_attempts: int = 7
    first_wait_s: float = 0.5
    max_wait_s: float = 16.0
    sleep: Callable[[float], None] = time.sleep
    random: Callable[[], float] = random.SystemRandom().random

    def wait_s(self, num_failed: int) -> float:
        """Pause after this many failed tries, in seconds."""
        return min(self.max_wait_s, self.first_wait_s * 2.0 ** (num_failed - 1)) * (1 - self.random() / 2)


DEFAULT_RETRIES = RetryPolicy()


def explain_os_error(error: Exception) -> StorageFailure | None:
    """Say what an operating system's error means; None for an error that is not the storage's."""
    if not isinstance(error, OSError):
        return None
    is_transient = error.errno in TRANSIENT_ERRNOS or isinstance(error, TimeoutError | ConnectionError)
    fix = FIXES.get(error.errno or 0, "check the storage, or choose another folder")
    return StorageFailure(error.strerror or str(error), fix, is_transient, error.errno)


def attempt(
    operation: str,
    path: str,
    action: Callable[[], Result],
    retries: RetryPolicy = DEFAULT_RETRIES,
    explain: Callable[[Exception], StorageFailure | None] = explain_os_error,
) -> Result:
    """Do it, again and again while it fails for transient reasons.

    Args:
        operation: A verb, for the error ("write").
        path: What it is done to, for the error.
        action: Does it. An exception that `explain` does not know goes through, as does a StorageError.
        retries: How often to try.
        explain: What an exception means.

    Raises:
        StorageError: it failed for good.
    """
    for num_failed in range(1, retries.num_attempts + 1):
        try:
            return action()
        except StorageError:
            raise
        except Exception as error:
            failure = (
                StorageFailure(str(error), "check the storage", is_transient=True)
                if isinstance(error, TryAgainError)
                else explain(error)
            )
            if failure is None:
                raise
            if not failure.is_transient or num_failed == retries.num_attempts:
                times = "once" if num_failed == 1 else f"{num_failed} times"
                message = f"could not {operation} {path} (tried {times}): {failure.reason}; {failure.fix}"
                raise StorageError(message, failure.errno, is_transient=failure.is_transient) from error
        wait_s = retries.wait_s(num_failed)
        logger.warning("could not %s %s: %s; next try in %.1f s", operation, path, failure.reason, wait_s)
        retries.sleep(wait_s)
    raise AssertionError("num_attempts is at least 1")
