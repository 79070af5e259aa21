"""The folders that every host of a job writes to: can it, how much room is there, and is it one folder for all?"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from launch.preflight.facts import Folder
from trainer.checkpoint.config import CheckpointConfig
from trainer.config import OutputConfig
from trainer.retries import RetryPolicy, StorageError
from trainer.storage import (
    exists,
    free_bytes,
    list_folder,
    make_folder,
    read_bytes,
    remove_folder,
    require_writable,
    write_text,
)

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
            write_text(f"{self._marks}/{MARK}{token}", token)
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

    def excuse(self, index: int | None, name: str, why: str) -> None:
        """Leave word for the first host, which this host cannot reach. In vain where the folder is not shared."""
        try:
            make_folder(self._marks, retries=ONCE)
            text = json.dumps({"index": index, "name": name, "why": why})
            write_text(f"{self._marks}/{EXCUSE}{name}-{index}", text)
        except StorageError:
            return

    def excuses(self) -> dict[int, tuple[str, str]]:
        """Return what hosts left word of, by their number: their name, and why they do not come."""
        found = {}
        try:
            for name in list_folder(self._marks):
                if name.startswith(EXCUSE):
                    excuse = json.loads(read_bytes(f"{self._marks}/{name}"))
                    if excuse["index"] is not None:
                        found[int(excuse["index"])] = (str(excuse["name"]), str(excuse["why"]))
        except (StorageError, ValueError, KeyError):
            return found
        return found

    def clean_up(self) -> None:
        """Remove the marks; the first host does, at the end."""
        try:
            if exists(self._marks):
                remove_folder(self._marks)
        except StorageError:
            return
