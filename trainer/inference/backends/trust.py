"""Whose formats are opened: those that this user built on this machine. Needs no torch.

To open a format is to run code: AOTInductor's is machine code, and `torch.export.load` unpickles (torch 2.13.0). A
checksum that lies beside the code says nothing of who wrote it. So building notes the digest of what was built outside
of the package, in $XDG_STATE_HOME/papilio/formats, one file a format, and only what is noted there is opened; or what
its user trusts by a flag. A package may be moved or copied on the machine: the digest goes by contents.
"""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime

from papilio.trainer.inference.package.format import PackageError

TRUST_FLAG = "--trust-formats"


def require_trust(folder: str, what: str, remedy: str) -> None:
    """Make sure that a format was built by this user on this machine; reads all of it.

    Raises:
        PackageError: it was not, or cannot be read.
    """
    notes, digest = _notes_folder(), _digest(folder)
    if notes is None or not os.path.isfile(os.path.join(notes, f"{digest}.json")):
        raise PackageError(
            f"{what} was not built by this user on this machine, and to open it would run its builder's code; {remedy} "
            f"here, or pass {TRUST_FLAG} if you trust whoever built it"
        )


def note_build(folder: str, target: str) -> str | None:
    """Note that this user built what lies in a folder, soon to be named `target`; say why if it cannot be noted."""
    notes = _notes_folder()
    if notes is None:
        return _not_noted(target, "this user has no home folder")
    path = os.path.join(notes, f"{_digest(folder)}.json")
    note = {"format": os.path.abspath(target), "built_at": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        os.makedirs(notes, mode=0o700, exist_ok=True)
        temporary = f"{path}.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        return _not_noted(target, f"{notes}: {error.strerror}")
    return None


def _not_noted(target: str, why: str) -> str:
    return (
        f"that {target} was built here cannot be noted ({why}), so it will be opened with {TRUST_FLAG} only; set "
        "XDG_STATE_HOME to a folder that can be written, and build it again"
    )


def _notes_folder() -> str | None:
    """Where desktop programs keep such state, too; None where there is no such place.

    Never a relative path: what lies in the folder that a command happens to be started in is anybody's.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):
        state = os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(state, "papilio", "formats") if os.path.isabs(state) else None


def _digest(folder: str) -> str:
    """SHA-256 of the names and contents of all files of a folder; links are none of them, and are refused."""
    digest = hashlib.sha256()
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted([*files, *(each for each in folders if os.path.islink(os.path.join(parent, each)))]):
            path = os.path.join(parent, name)
            if os.path.islink(path) or not os.path.isfile(path):
                raise PackageError(f"{path} is a link or no plain file, which no format has; remove it")
            with open(path, "rb") as file:
                of_file = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{os.path.relpath(path, folder)}\0{of_file}\0".encode())
    return digest.hexdigest()
