"""The checkpoints of a run: which there are, which count, which go. Needs no torch."""

from __future__ import annotations

import errno
import logging
import math
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from papilio.data_pipeline.inner_path import link_problem
from papilio.data_pipeline.paths import join
from papilio.trainer.checkpoint.format import (
    INDEX,
    MARKER,
    STEP_FOLDER,
    Block,
    CheckpointError,
    DamagedError,
    Index,
    Marker,
    copy_folder,
)
from papilio.trainer.checkpoint.read_blocks import read_block
from papilio.trainer.storage.api import (
    StorageError,
    exists,
    file_size,
    list_folder,
    read_bytes,
    remove_file,
    remove_folder,
)

logger = logging.getLogger(__name__)
# Blocks read at a time to be checked: an object store answers several requests faster than one after the other.
NUM_READERS = 4
# Files looked for at a time, and how long one that another host wrote may take to be seen.
NUM_LOOKERS = 16
SEEN_TIMEOUT_S = 20.0
POLL_S = 0.25


@dataclass(frozen=True)
class Committed:
    """A complete checkpoint: its folder's name and its marker."""

    name: str
    marker: Marker

    @property
    def validation_auc(self) -> float:
        """AUC of the validation made at its very step; NaN if there was none."""
        found = [values["auc"] for step, values in self.marker.progress["validations"] if step == self.marker.step]
        return found[-1] if found else math.nan


class CheckpointFolder:
    """The folder in which a run's checkpoints lie, local or in an object store."""

    def __init__(self, path: str) -> None:
        """`unusable` are checkpoints that were found damaged or unreadable: not counted, and not removed."""
        self.path = path
        self.unusable: set[str] = set()

    def names(self) -> list[str]:
        """Names of all checkpoints, complete or not, oldest first."""
        return [name for name in list_folder(self.path) if STEP_FOLDER.fullmatch(name)]

    def committed_names(self) -> list[str]:
        """Names of the complete ones, oldest first, and of those that cannot be looked into: reading these says why.

        Raises:
            StorageError: the storage does not answer, or the folder itself cannot be read.
        """
        return [name for name in self.names() if self._has_marker(name)]

    def _has_marker(self, name: str) -> bool:
        try:
            return exists(join(self.path, name, MARKER))
        except StorageError as error:
            if is_unreachable(error):
                raise
            return True

    def read_marker(self, name: str) -> Marker:
        """Read one's marker.

        Raises:
            CheckpointError: it is damaged, cannot be read, or is of another version.
            StorageError: the storage does not answer.
        """
        path = join(self.path, name, MARKER)
        with unreadable_is_damaged():
            text = read_bytes(path).decode(errors="replace")
        return Marker.from_json(text, path)

    def committed(self) -> list[Committed]:
        """Return the complete ones whose markers can be read, oldest first; the others are logged."""
        found = []
        for name in self.committed_names():
            try:
                found.append(Committed(name, self.read_marker(name)))
            except CheckpointError as error:
                logger.warning("%s", error)
        return found

    def read_index(self, name: str, marker: Marker, copy: int = 0) -> Index:
        """Read and check the index of one copy of the model.

        Raises:
            DamagedError: it is missing or damaged.
        """
        prefix = copy_folder(name, copy, marker.num_copies).removeprefix(name).lstrip("/")
        file = join(prefix, INDEX)
        raw = self.read_listed(name, marker, file)
        try:
            index = Index.from_json(raw.decode())
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise DamagedError(
                f"{join(self.path, name, file)} is damaged: it is no index of tensors ({str(error)[:99]})"
            ) from None
        strange = sorted(part for part in index.part_sizes() if join(prefix, part) not in marker.files)
        if strange:
            raise DamagedError(
                f"{join(self.path, name, file)} is damaged: it places values in {strange[0]!r}, not listed in {MARKER}"
            )
        return index

    def read_listed(self, name: str, marker: Marker, file: str) -> bytes:
        """Read a whole file whose checksum the marker has.

        Raises:
            DamagedError: it is missing or damaged.
        """
        path = join(self.path, name, file)
        if file not in marker.files:
            raise DamagedError(f"{join(self.path, name, MARKER)} lists no {file}")
        size, crc32 = marker.files[file]
        with unreadable_is_damaged():
            if not exists(path):
                raise DamagedError(f"{path} is missing")
            problem = link_problem(join(self.path, name), file)
            if problem is not None:
                raise DamagedError(problem)
            raw = read_bytes(path)
        if len(raw) != size or zlib.crc32(raw) != crc32:
            raise DamagedError(f"{path} is damaged: its size or checksum is not what {MARKER} says")
        return raw

    def verify(self, name: str) -> Iterator[tuple[str, Block | None, str | None]]:
        """Read everything of a checkpoint, block by block.

        Yields:
            (file or tensor, block, what is wrong with it or None), as it goes; tensors of one copy of several are
            named as if they lay in its folder.

        Raises:
            CheckpointError: its marker is damaged or of another version.
        """
        marker = self.read_marker(name)
        for file in marker.files:
            yield file, None, self._what_is_wrong(name, marker, file)
        for copy in range(marker.num_copies):
            folder = copy_folder(join(self.path, name), copy, marker.num_copies)
            prefix = copy_folder("", copy, marker.num_copies).lstrip("/")
            try:
                index = self.read_index(name, marker, copy)
            except (CheckpointError, StorageError) as error:
                if join(prefix, INDEX) in marker.files:
                    yield join(prefix, INDEX), None, str(error)
                else:
                    yield MARKER, None, str(error)
                continue
            for key, block, problem in _check_blocks(folder, index):
                yield join(prefix, key), block, problem

    def sweep(self) -> list[str]:
        """Remove what was never completed, and return the names; only while no job saves here.

        What cannot be removed stays, for it does no harm.
        """
        complete = set(self.committed_names())
        swept = []
        for name in self.names():
            if name in complete:
                continue
            try:
                remove_folder(join(self.path, name))
                swept.append(name)
            except StorageError as error:
                logger.warning("%s was never completed and stays: %s", name, error)
        return swept

    def surplus(self, keep_last: int, *, keep_best: bool) -> list[Committed]:
        """Return all but the newest `keep_last` and, with `keep_best`, the best."""
        committed = [found for found in self.committed() if found.name not in self.unusable]
        kept = {found.name for found in committed[-keep_last:]}
        best = best_of(committed)
        if keep_best and best is not None:
            kept.add(best.name)
        return [found for found in committed if found.name not in kept]

    def prune(self, keep_last: int, *, keep_best: bool) -> list[str]:
        """Remove what is `surplus`; return the names removed."""
        removed = [found.name for found in self.surplus(keep_last, keep_best=keep_best)]
        for name in removed:
            self.remove(name)
        return removed

    def remove(self, name: str) -> None:
        """Remove a checkpoint, its marker first, so that it is never seen half there."""
        remove_file(join(self.path, name, MARKER))
        remove_folder(join(self.path, name))

    def await_files(self, name: str, marker: Marker) -> str | None:
        """Wait until all files of a marker are seen here with their sizes; say which is not, if one is not in time.

        Other hosts wrote them, and a network disk may show them late.
        """
        deadline_s = time.monotonic() + SEEN_TIMEOUT_S
        files = list(marker.files.items())
        with ThreadPoolExecutor(NUM_LOOKERS) as pool:
            while True:
                problems = list(pool.map(lambda item: self._wrong_size(name, item[0], item[1][0]), files))
                files = [item for item, problem in zip(files, problems, strict=True) if problem is not None]
                if not files or time.monotonic() > deadline_s:
                    return next((problem for problem in problems if problem is not None), None)
                time.sleep(POLL_S)
                list_folder(join(self.path, name))  # makes an NFS client look again

    def first_problem(self, found: Committed) -> str | None:
        """Say which of its files is missing or of another size, if any; nothing is read."""
        problems = (self._wrong_size(found.name, file, size) for file, (size, _) in found.marker.files.items())
        return next((problem for problem in problems if problem is not None), None)

    def _what_is_wrong(self, name: str, marker: Marker, file: str) -> str | None:
        size, crc32 = marker.files[file]
        if crc32 is None:
            return self._wrong_size(name, file, size)
        try:
            self.read_listed(name, marker, file)
        except (CheckpointError, StorageError) as error:
            return str(error)
        return None

    def _wrong_size(self, name: str, file: str, size: int) -> str | None:
        path = join(self.path, name, file)
        try:
            found = file_size(path)
        except StorageError as error:
            is_missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
            return f"{path} is missing" if is_missing else str(error)
        if found != size:
            return f"{path} has {found:,} bytes, not the {size:,} that were written"
        return link_problem(join(self.path, name), file)


def _check_blocks(folder: str, index: Index) -> Iterator[tuple[str, Block, str | None]]:
    """Read every block, several at a time and in the order of the files; yield its tensor, and what is wrong."""

    def problem_of(item: tuple[str, Block]) -> str | None:
        try:
            read_block(folder, *item)
        except (CheckpointError, StorageError) as error:
            return str(error)
        return None

    items = [(key, block) for key, tensor in index.tensors.items() for block in tensor.blocks]
    items.sort(key=lambda item: (item[1].file, item[1].start))
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for (key, block), problem in zip(items, pool.map(problem_of, items), strict=True):
            yield key, block, problem


def is_unreachable(error: StorageError) -> bool:
    """Whether it is the storage that does not answer, rather than a file that cannot be read (EIO: a bad sector)."""
    return error.is_passing and error.errno != errno.EIO


@contextmanager
def unreadable_is_damaged() -> Iterator[None]:
    """Take a file that cannot be read for a damaged one.

    Raises:
        DamagedError: it cannot be read.
        StorageError: the storage does not answer.
    """
    try:
        yield
    except StorageError as error:
        if is_unreachable(error):
            raise
        raise DamagedError(str(error)) from error


def best_of(committed: list[Committed]) -> Committed | None:
    """Return the one with the highest validation AUC, the older of equals; None if none was validated."""
    validated = [found for found in committed if not math.isnan(found.validation_auc)]
    return max(validated, key=lambda found: found.validation_auc, default=None)
