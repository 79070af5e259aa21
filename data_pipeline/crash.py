"""What nobody foresaw, in one line: the traceback goes to a file that can be sent to whoever can read it."""

from __future__ import annotations

import os
import tempfile
import time
import traceback

_REPORTS = "papilio/crashes"
_MAX_CHARACTERS = 500


def describe_unforeseen(error: BaseException) -> str:
    """Say what went wrong, in one line; write the traceback of an error that is no operating system's to a file.

    An OSError is about a file or the machine, and its own words say which. Anything else is a fault of Papilio's.
    """
    if isinstance(error, OSError) and error.strerror:
        where = ": " + ", ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return _one_line(f"{error.strerror}{where if error.filename is not None else ''}")
    what = _one_line(f"{type(error).__name__}: {error}")
    report = _write("".join(traceback.format_exception(error)))
    kept = f"its traceback is in {report}: please report it" if report else "please report it"
    return f"internal error: {what} (a fault of Papilio; {kept})"


def _one_line(text: str) -> str:
    line = "".join(char if char.isprintable() else " " for char in text)
    return line if len(line) <= _MAX_CHARACTERS else f"{line[:_MAX_CHARACTERS]}..."


def _write(text: str) -> str | None:
    """Write a report where it stays, or else among temporary files; None if there is no place."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    for parent in (state, tempfile.gettempdir()):
        if not os.path.isabs(parent):
            continue
        try:
            folder = os.path.join(parent, _REPORTS)
            os.makedirs(folder, exist_ok=True)
            path = os.path.join(folder, f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}.txt")
            with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError:
            continue
        return path
    return None
