"""The folders that every host of a job writes to: can it, how much room is there, and is it one folder for all?"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from papilio.launch.preflight.facts import Folder
from papilio.launch.preflight.meeting import Excuse
from papilio.trainer.checkpoint.config import CheckpointConfig
from papilio.trainer.config import OutputConfig
from papilio.trainer.storage.api import (
    exists,
    free_bytes,
    list_folder,
    make_folder,
    read_bytes,
    remove_file,
    remove_folder,
    require_writable,
    write_text,
)
from papilio.trainer.storage.retries import RetryPolicy, StorageError

# How long a file written on one host may take to be seen on another, which never asked for it before.
SEEN_TIMEOUT_S = 3.0
POLL_S = 0.2
ONCE = RetryPolicy(num_attempts=1)
MARK, EXCUSE = "mark-", "excuse-"


def written_folders(output: OutputConfig, checkpoint: CheckpointConfig) -> list[str]:
    """Return the folders that a run writes to and that exist before it, or can be made: its own may be new."""
    folders = [output.run_dir or output.runs_dir]
    if checkpoint.folder is not None:
        folders.append(checkpoint.folder)
    return folders


class SharedFolder:
    """A folder of marks that one preflight leaves in a folder, to be found by its other hosts; gone afterwards."""

    def __init__(self, path: str, job: str, read_free_bytes: Callable[[str], int | None] = free_bytes) -> None:
        """`job` makes the name of the folder of marks."""
        self.path = path
        self._marks = f"{path.rstrip('/')}/.preflight-{job}"
        self._read_free_bytes = read_free_bytes
        self._error = ""

    def leave_mark(self, token: str) -> None:
        """Try to write here, and leave this host's token; what goes wrong is told by `look`."""
        try:
            require_writable(self.path, retries=ONCE)
            make_folder(self._marks, retries=ONCE)
            write_text(f"{self._marks}/{MARK}{token}", token, retries=ONCE)
        except StorageError as error:
            self._error = str(error)

    def look(self, expected: Sequence[str]) -> Folder:
        """Say what this folder is like on this host; wait a little until the marks of all expected tokens are seen."""
        if self._error:
            return Folder(path=self.path, error=self._error)
        deadline = time.monotonic() + SEEN_TIMEOUT_S
        try:
            while len(marks := self._seen(expected)) < len(expected) and time.monotonic() < deadline:
                time.sleep(POLL_S)
            return Folder(path=self.path, free_bytes=self._read_free_bytes(self.path), marks=tuple(marks))
        except StorageError as error:
            return Folder(path=self.path, error=str(error))

    def _seen(self, tokens: Sequence[str]) -> list[str]:
        """Return those of the tokens whose marks are here. By name: what a folder holds is cached by NFS for longer."""
        return [token for token in tokens if exists(f"{self._marks}/{MARK}{token}")]

    def report_absence(self, index: int | None, name: str, why: str) -> None:
        """Leave word for the first host, which this host cannot reach; with no reason, take it back.

        In vain where the folder is not shared.
        """
        path = f"{self._marks}/{EXCUSE}{name}-{index}"
        try:
            if not why:
                remove_file(path)
                return
            make_folder(self._marks, retries=ONCE)
            write_text(path, json.dumps({"index": index, "name": name, "why": why}), retries=ONCE)
        except StorageError:
            return

    def absences(self) -> list[Excuse]:
        """Return what hosts left word of."""
        found: list[Excuse] = []
        try:
            for name in list_folder(self._marks):
                if name.startswith(EXCUSE):
                    found.append(Excuse(**json.loads(read_bytes(f"{self._marks}/{name}"))))
        except (StorageError, ValueError, TypeError):
            return found
        return found

    def forget_absences(self) -> None:
        """Remove what an earlier preflight of the same name may have left; hosts that have an excuse repeat it."""
        try:
            for name in list_folder(self._marks):
                if name.startswith(EXCUSE):
                    remove_file(f"{self._marks}/{name}")
        except StorageError:
            return

    def clean_up(self) -> None:
        """Remove the marks; the first host does, at the end."""
        try:
            if exists(self._marks):
                remove_folder(self._marks)
        except StorageError:
            return
