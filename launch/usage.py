"""What the command line's user got wrong, said in one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from papilio.trainer.storage.retries import StorageError


class UsageError(ValueError):
    """A command line that cannot be followed: a missing file, or a value that is not allowed."""


class RefusedError(ValueError):
    """What was found before any process started, and would go wrong again however often it is tried: status 78."""


def is_ours(error: BaseException) -> bool:
    """Return whether the error's class is one of ours: then it was foreseen, and its message says what to do."""
    return type(error).__module__.partition(".")[0] == "papilio"


@contextmanager
def refusing() -> Iterator[None]:
    """Take what is wrong with a job's input for a refusal; a storage that may answer again is none.

    Raises:
        RefusedError: it is wrong.
    """
    try:
        yield
    except (ValueError, StorageError) as error:
        if (
            isinstance(error, UsageError)
            or not is_ours(error)
            or (isinstance(error, StorageError) and error.is_passing)
        ):
            raise
        raise RefusedError(str(error)) from error


def require_files(option: str, paths: Iterable[str]) -> None:
    """Check that local files exist; paths with a scheme ("s3://...") are left to whoever opens them.

    Raises:
        UsageError: one does not exist, or is a folder.
    """
    for path in paths:
        if "://" not in path and not Path(path).is_file():
            found = "is a folder, not a file" if Path(path).is_dir() else "does not exist"
            raise UsageError(f"{option} {path} {found}; give the path of a file")


def require_folder(option: str, path: str, made_by: str) -> None:
    """Check that a local folder exists; `made_by` is the command that makes one.

    Raises:
        UsageError: it does not, or is a file.
    """
    if "://" not in path and not Path(path).is_dir():
        found = "is a file, not a folder" if Path(path).exists() else "does not exist"
        raise UsageError(f"{option} {path} {found}; {made_by} makes one")
