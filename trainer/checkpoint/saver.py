"""Saves a training state while training goes on: a copy in host memory, written by a thread, committed last."""

from __future__ import annotations

import logging
import secrets
import time
import warnings
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from papilio.data_pipeline.paths import join
from papilio.trainer.checkpoint.config import CheckpointConfig
from papilio.trainer.checkpoint.dcp_storage import PartFileWriter
from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.checkpoint.format import (
    INDEX,
    MARKER,
    PLAN,
    CheckpointError,
    Index,
    LostTableError,
    Marker,
    copy_folder,
)
from papilio.trainer.checkpoint.model_state import ModelState, model_state, weight_key
from papilio.trainer.checkpoint.pieces import PiecesSavePlanner
from papilio.trainer.optimizers import Optimizers
from papilio.trainer.process_group import Ranks
from papilio.trainer.run.lock import LostLockError, RunLock
from papilio.trainer.sharded_model import ShardedModel
from papilio.trainer.storage.api import StorageError, make_folder, remove_folder, write_text

logger = logging.getLogger(__name__)

MIB = 1 << 20


class SaveError(RuntimeError):
    """A checkpoint could not be written; the message says where and why. Raised on every rank."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was committed.

    Attributes:
        name: its folder.
        num_bytes: size of its files (known to the first rank).
        write_s: how long writing took, beside training.
        unix_s: when the state was copied.
    """

    name: str
    step: int
    num_bytes: int = 0
    write_s: float = 0.0
    unix_s: float = 0.0


class Saver:
    """Saves checkpoints of one job, one at a time; every method is collective.

    The thread talks to those of the other ranks over groups of its own: collectives of two threads in one group would
    meet each other's (a save over the training's group never ended, 4 runs of 4, torch 2.13).
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        config: CheckpointConfig,
        model: ShardedModel,
        optimizers: Optimizers,
        ranks: Ranks,
        lock: RunLock | None = None,
    ) -> None:
        """`lock` is that of the folder, on the first rank."""
        self._folder = folder
        self._lock = lock
        self._config = config
        self._model = model
        self._optimizers = optimizers
        self._ranks = ranks
        self._all = dist.new_group(backend="gloo")
        self._copy_group = _copy_group(model, ranks)
        # Part of every name: a name is never used again, whatever an earlier attempt left behind.
        self._attempt = ranks.agree_on(secrets.token_hex(3) if ranks.is_first else None)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[Saved] | None = None
        self._snapshot: ModelState | None = None
        self.latest: Saved | None = None
        self.stalls_s: list[float] = []

    @property
    def num_copies(self) -> int:
        """Copies of the model that differ, each saved in a folder of its own."""
        return self._model.num_copies

    def save(self, marker: Marker, *, wait: bool = False) -> None:
        """Save the state as it is now; `marker` says what it is, but for its files.

        Returns when training may go on: at once after the copy, or with `wait` when it is committed.

        Raises:
            SaveError: with `wait`, it could not be written.
            LostTableError: it would not hold the whole model, and no other would.
            LostLockError: the folder is another job's by now.
        """
        begin_s = time.perf_counter()
        self.check(wait=True)
        state = model_state(self._model.module, self._optimizers)
        has_to_wait = wait or not self._config.asynchronous
        if not has_to_wait:
            # Its memory is kept for the next one: new memory costs more time than the copy.
            state = self._snapshot = state.snapshot(self._snapshot)
        saved = Saved(f"step_{marker.step:010}-{self._attempt}", marker.step, unix_s=time.time())
        self._under_way = self._executor.submit(self._write, saved, marker, state)
        self.stalls_s.append(time.perf_counter() - begin_s)
        if has_to_wait:
            self._under_way.exception()
            self.stalls_s[-1] = time.perf_counter() - begin_s
            self.check(wait=True, reraise=wait)

    def check(self, *, wait: bool, reraise: bool = False) -> None:
        """Take in how the last save ended, if it did; one that failed is a warning, or raised.

        Raises:
            SaveError: with `reraise`, it could not be written.
        """
        if self._under_way is None or not (wait or self._under_way.done()):
            return
        finished, self._under_way = self._under_way, None
        try:
            self.latest = finished.result()
            if self._ranks.is_first:
                print(self._told(self.latest), flush=True)
        except SaveError as error:
            if reraise:
                raise
            if self._ranks.is_first:
                newest = f"the newest is of step {self.latest.step:,}" if self.latest else "there is none yet"
                logger.warning("%s; training goes on without this checkpoint (%s)", error, newest)

    def amend(self, progress: dict[str, Any]) -> None:
        """Write more progress into the marker of the newest checkpoint; not collective. A failure is logged only."""
        assert self._under_way is None
        if self.latest is None:
            return
        try:
            marker = self._folder.read_marker(self.latest.name)
            marker = replace(marker, progress={**marker.progress, **progress})
            write_text(join(self._folder.path, self.latest.name, MARKER), marker.to_json())
            self._folder.prune(self._config.keep_last, keep_best=self._config.keep_best)
        except (CheckpointError, StorageError) as error:
            logger.warning("checkpoint %s does not know how it validates: %s", self.latest.name, error)

    def close(self) -> None:
        """Wait for the thread, after a run that went well."""
        self.check(wait=True)
        self._executor.shutdown()
        for group in (self._copy_group, self._all):
            if group is not None:
                dist.destroy_process_group(group)

    def abandon(self) -> None:
        """Leave the thread to itself, after an error: what it is writing is not committed."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _write(self, saved: Saved, marker: Marker, state: ModelState) -> Saved:
        """Write and commit; runs in the thread."""
        begin_s = time.perf_counter()
        path = join(self._folder.path, saved.name)
        files: dict[str, tuple[int, int | None]] = {}
        error: str | Exception | None = None
        try:
            files = self._write_files(path, marker, state)
        except LostTableError as lost:
            error = lost
        except CheckpointException as failed:  # DCP's own, of every rank; no Exception to Python
            cause = next(cause for cause, _ in failed.failures.values())
            error = cause if isinstance(cause, LostTableError) else _first_line(cause)
        except Exception as caught:  # every rank must hear of it
            error = _first_line(caught)
        self._agree(saved, error)
        all_files: list[dict[str, Any] | None] = [None] * self._ranks.world_size
        dist.all_gather_object(all_files, files, group=self._all)
        listed = {name: entry for files in all_files if files for name, entry in files.items()}
        self._agree(saved, self._commit(path, replace(marker, files=listed)) if self._ranks.is_first else None)
        num_bytes = sum(size for size, _ in listed.values())
        return replace(saved, num_bytes=num_bytes, write_s=time.perf_counter() - begin_s)

    def _write_files(self, path: str, marker: Marker, state: ModelState) -> dict[str, tuple[int, int | None]]:
        """Write this rank's part; returns what the marker has to list, on one rank of each copy."""
        if self._copy_group is None:
            return {}
        folder = copy_folder(path, self._model.group_index, marker.num_copies)
        index = write_tensors(state, folder, self._copy_group)
        if index is None:
            return {}
        check_whole(index, {t.name: (t.num_embeddings, t.embedding_dim) for t in self._model.plan.tables})
        files: dict[str, tuple[int, int | None]] = {file: (size, None) for file, size in index.part_sizes().items()}
        for file, text in ((INDEX, index.to_json()), (PLAN, self._model.plan.to_json())):
            write_text(join(folder, file), text)
            files[file] = (len(text.encode()), zlib.crc32(text.encode()))
        return {join(folder, file).removeprefix(path).lstrip("/"): entry for file, entry in files.items()}

    def _told(self, saved: Saved) -> str:
        return (
            f"checkpoint of step {saved.step:,}: {saved.num_bytes / MIB:,.1f} MiB written in {saved.write_s:.1f} s, "
            f"training waited {self.stalls_s[-1]:.2f} s"
        )

    def _commit(self, path: str, marker: Marker) -> str | Exception | None:
        """Once every part is seen, write the marker, and remove what need not be kept; returns what went wrong."""
        try:
            missing = self._folder.await_files(path.rpartition("/")[2], marker)
            if missing is not None:
                return f"{missing}; do all hosts write to one shared folder there?"
            if self._lock is not None:
                self._lock.require_held()
            now = datetime.now(UTC).isoformat(timespec="seconds")
            write_text(join(path, MARKER), replace(marker, saved_at=now).to_json())
        except LostLockError as error:
            return error
        except Exception as error:  # every rank must hear of it
            return _first_line(error)
        try:
            self._folder.prune(self._config.keep_last, keep_best=self._config.keep_best)
        except OSError as error:
            logger.warning("older checkpoints could not be removed: %s", error)
        return None

    def _agree(self, saved: Saved, error: str | Exception | None) -> None:
        """Raise on every rank what went wrong on any, and remove what was written.

        An exception would come at every save: it ends the job. A text is of this save alone.
        """
        errors: list[str | Exception | None] = [None] * self._ranks.world_size
        dist.all_gather_object(errors, error, group=self._all)
        found = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error]
        if not found:
            return
        path = join(self._folder.path, saved.name)
        if self._ranks.is_first:
            try:
                remove_folder(path)
            except OSError as problem:
                logger.warning("%s could not be removed: %s", path, problem)
        final = next((error for error in errors if isinstance(error, Exception)), None)
        if final is not None:
            raise final
        raise SaveError(f"checkpoint {path} could not be written: {found[0]}")


def check_whole(index: Index, tables: Mapping[str, tuple[int, int]]) -> None:
    """Check that a checkpoint holds all tables of the plan, and of every tensor all values, each once.

    It is the last guard against a TorchRec whose internals we no longer understand: a lookup that
    sharding/compat/torchrec_internals.py did not find would be a table that is not saved, without a word.

    Args:
        index: of one copy of the model.
        tables: rows and columns of each planned table, by name.

    Raises:
        LostTableError: it does not; the message names the tables, and what is missing of them.
    """
    lost = []
    for name, shape in tables.items():
        tensor = index.tensors.get(weight_key(name))
        if tensor is None:
            lost.append(name)
        elif tensor.shape != shape:
            found, planned = (" x ".join(f"{size:,}" for size in sizes) for sizes in (tensor.shape, shape))
            lost.append(f"{weight_key(name)} (it has {found} values, {planned} are planned)")
    problems = {key: tensor.coverage_problem() for key, tensor in index.tensors.items()}
    lost += [f"{key} ({problem})" for key, problem in problems.items() if problem is not None]
    if lost:
        raise LostTableError.of(lost)


def _copy_group(model: ShardedModel, ranks: Ranks) -> dist.ProcessGroup | None:
    """Return the ranks that save one copy of the model together; None where another group saves for this one."""
    size = ranks.world_size // model.replicas.num_groups
    mine = None
    for group in range(model.num_copies):
        made = dist.new_group(list(range(group * size, (group + 1) * size)), backend="gloo")
        if ranks.rank // size == group:
            mine = made
    return mine


def write_tensors(state: ModelState, folder: str, group: dist.ProcessGroup | None) -> Index | None:
    """Write one copy of the model into a folder; returns the index on one rank. Collective over `group`.

    Raises:
        CheckpointException: what went wrong, by rank; raised on all.
    """
    finished: list[Index] = []
    make_folder(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            state.in_blocks().tensors,
            storage_writer=PartFileWriter(folder, state.column_starts, finished.append),
            planner=PiecesSavePlanner(),
            process_group=group,
        )
    return finished[0] if finished else None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0]
