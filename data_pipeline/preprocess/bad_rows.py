"""Malformed rows: how they are named, when they are too many, and where they are set aside."""

from __future__ import annotations

import os
from dataclasses import dataclass

BAD_ROWS_NAME = "bad_rows.tsv"


class PreprocessError(ValueError):
    """Input that cannot be preprocessed as asked; the message names the place and the fix."""


@dataclass(frozen=True)
class BadRow:
    """A malformed row: its line (1-based, of its block at first, of its file when placed), the fault, the bytes."""

    line: int
    field: str
    reason: str
    raw: bytes

    def describe(self, file: str) -> str:
        """Say where the row is and what is wrong with it."""
        return f"{file}, line {self.line}, field {self.field}: {self.reason}"


class BadRows:
    """Counts the malformed rows in input order, refuses one more than allowed, and writes those it accepted."""

    def __init__(self, max_bad_rows: int) -> None:
        self._max_bad_rows = max_bad_rows
        self._lines: list[bytes] = []

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, row: BadRow, file: str) -> None:
        """Set a row aside.

        Raises:
            PreprocessError: more rows are malformed than allowed.
        """
        if len(self._lines) == self._max_bad_rows:
            allowed = f"; {self._max_bad_rows} malformed rows are allowed and this is one more" * (
                self._max_bad_rows > 0
            )
            raise PreprocessError(
                f"{row.describe(file)}{allowed}. Correct the file, or raise --max-bad-rows to set malformed rows aside "
                f"in {BAD_ROWS_NAME} (work done so far is kept)"
            )
        place = f"{file}\t{row.line}\tfield {row.field}: {row.reason}\t"
        self._lines.append(place.encode() + row.raw.rstrip(b"\r\n") + b"\n")

    def write(self, folder: str) -> None:
        """Write the rows set aside: file, line, reason and the raw row (which may hold tabs of its own)."""
        if not self._lines:
            return
        path = os.path.join(folder, BAD_ROWS_NAME)
        with open(path + ".tmp", "wb") as file:
            file.write(b"file\tline\treason\traw row\n")
            file.writelines(self._lines)
        os.replace(path + ".tmp", path)
