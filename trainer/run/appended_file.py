"""A file that grows while a run goes on. A disk that fails under it is logged once, and ends no training."""

from __future__ import annotations

import logging
import os
from contextlib import suppress

from papilio.trainer.storage.local_files import open_regular

logger = logging.getLogger(__name__)


class AppendedFile:
    """Takes whole records; what cannot be written is missing, and counted. Nothing here raises."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._num_lost = 0
        self._has_told = False
        self._file: int | None = None
        try:
            self._file = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        except OSError as error:
            self._tell(error)

    def append(self, record: bytes) -> None:
        """Add a record, whole or not at all, so that a disk that was full for a while leaves no half ones."""
        if self._file is None:
            self._num_lost += 1
            return
        size = 0
        try:
            size = os.fstat(self._file).st_size
            rest = record
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            self._num_lost += 1
            with suppress(OSError):
                os.ftruncate(self._file, size)
            self._tell(error)

    def close(self) -> None:
        """Close the file, and say what is missing in it."""
        if self._num_lost:
            logger.warning("%s lacks %d record(s) that could not be written", self.path, self._num_lost)
            self._num_lost = 0
        if self._file is not None:
            with suppress(OSError):
                os.close(self._file)
        self._file = None

    def _tell(self, error: OSError) -> None:
        if not self._has_told:
            logger.warning("%s cannot be written: %s; training goes on without", self.path, error.strerror or error)
        self._has_told = True
