"""metrics.jsonl, what a run measures: a line of JSON each. Of a resumed run, what is measured again is dropped."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from typing import Any

from papilio.trainer.run.appended_file import AppendedFile
from papilio.trainer.storage.api import to_json, write_file

logger = logging.getLogger(__name__)


def open_metrics(path: str, step: int, validated: Iterable[int] = ()) -> AppendedFile:
    """Open the metrics of a run that has done `step` steps, without what will be measured again.

    That is all of the steps after `step`, and of this very step what is measured after its checkpoint: the test split,
    and the validation unless the checkpoint has it (its step is among `validated`).
    """
    try:
        if os.path.isfile(path):
            _drop_after(path, step, set(validated))
    except OSError as error:
        logger.warning("%s could not be gone through (%s); some of its lines may be there twice", path, error)
    return AppendedFile(path)


def metrics_line(kind: str, step: int, values: dict[str, Any]) -> bytes:
    """Return a line; `kind` names the split or phase."""
    return (to_json({"kind": kind, "step": step, **values}) + "\n").encode()


def _drop_after(path: str, step: int, validated: set[int]) -> None:
    """Drop what will be measured again, and lines that nobody can read; these are logged, and kept beside the file."""
    with open(path, "rb") as file:
        lines = file.readlines()
    kept, damaged = [], []
    for number, line in enumerate(lines, start=1):
        entry = _entry(line)
        if entry is None:
            # A kill cuts the last line off, which is no news.
            if number < len(lines) or line.endswith(b"\n"):
                damaged.append((number, line))
        elif entry["step"] < step or (entry["step"] == step and not _is_measured_again(entry, validated)):
            kept.append(line)
    if damaged:
        aside, numbers = f"{path}.damaged", ", ".join(str(number) for number, _ in damaged[:3])
        more = ", ..." if len(damaged) > 3 else ""
        write_file(aside, lambda: [line for _, line in damaged])
        logger.warning(
            "%s: %d damaged line(s) (%s%s) are left out, and kept in %s", path, len(damaged), numbers, more, aside
        )
    if len(kept) < len(lines):
        write_file(path, lambda: kept)


def _is_measured_again(entry: dict[str, Any], validated: set[int]) -> bool:
    return entry["kind"] == "test" or (entry["kind"] == "validation" and entry["step"] not in validated)


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return what a line says, None where it is damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_whole = isinstance(entry, dict) and isinstance(entry.get("kind"), str) and type(entry.get("step")) is int
    return entry if is_whole else None
