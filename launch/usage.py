"""What the command line's user got wrong, said in one line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class UsageError(ValueError):
    """A command line that cannot be followed: a missing file, or a value that is not allowed."""


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
