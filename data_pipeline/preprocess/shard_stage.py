"""Third stage: staged chunks and key-to-id tables to the shards of each split."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from papilio.data_pipeline.array_file import ArrayFile, write_arrays
from papilio.data_pipeline.manifest import SPLITS, ShardInfo
from papilio.data_pipeline.preprocess.bad_rows import PreprocessError
from papilio.data_pipeline.preprocess.splits import NUM_SPLITS, SplitRule
from papilio.data_pipeline.preprocess.stage_folder import Stage
from papilio.data_pipeline.schema import Schema
from papilio.data_pipeline.shards import Bags, Columns, file_crc32, write_shard

# About: a shard is put together in memory, twice over for bags.
SHARD_BYTES = 128 << 20
_ID_BYTES = 4


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of those rows of a chunk that are in the shard's split; the chunk's first row is global."""

    chunk: int
    first_row: int
    num_rows: int
    start: int
    stop: int


@dataclass(frozen=True)
class ShardJob:
    """What all shards have in common."""

    schema: Schema
    rule: SplitRule
    stage: Stage
    output: str
    input_crc32: int


@dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    split: int
    number: int
    pieces: tuple[Piece, ...]
    job: ShardJob


@dataclass(frozen=True)
class WrittenShard:
    """A finished shard and its number of positive labels."""

    split: int
    info: ShardInfo
    num_positives: int


def list_shards(chunk_rows: list[int], rows_per_shard: int, job: ShardJob) -> Iterator[ShardTask]:
    """Yield all shards, of at most `rows_per_shard` rows and SHARD_BYTES bytes, or of one row.

    Where they are cut depends on the rows alone, not on the chunks.
    """
    begun = [_BegunShard(split, rows_per_shard, job) for split in range(NUM_SPLITS)]
    first_row = 0
    for chunk, num_rows in enumerate(chunk_rows):
        row_bytes = _row_bytes(chunk, num_rows, job)
        for shard, row_ends in zip(begun, _row_ends_per_split(job.rule, first_row, row_bytes), strict=True):
            start = 0
            while start < len(row_ends) - 1:
                stop = start + shard.num_rows_that_fit(row_ends[start:])
                if stop > start:
                    num_bytes = int(row_ends[stop] - row_ends[start])
                    shard.add(Piece(chunk, first_row, num_rows, start, stop), num_bytes)
                if stop < len(row_ends) - 1 or shard.is_full:
                    yield shard.finish()
                start = stop
        first_row += num_rows
    for shard in begun:
        if shard.num_rows:
            yield shard.finish()


class _BegunShard:
    """The next shard of a split while its rows are found."""

    def __init__(self, split: int, rows_per_shard: int, job: ShardJob) -> None:
        self._split, self._rows_per_shard, self._job = split, rows_per_shard, job
        self._number = 0
        self._begin()

    def _begin(self) -> None:
        self.num_rows, self._num_bytes = 0, 0
        self._pieces: list[Piece] = []

    @property
    def is_full(self) -> bool:
        return self.num_rows == self._rows_per_shard

    def num_rows_that_fit(self, row_ends: NDArray[np.int64]) -> int:
        """How many of the rows that begin and end at these bytes; at least one if there is none yet."""
        most = min(len(row_ends) - 1, self._rows_per_shard - self.num_rows)
        room = row_ends[0] + max(SHARD_BYTES - self._num_bytes, 0)
        return max(min(most, int(np.searchsorted(row_ends, room, side="right")) - 1), int(self.num_rows == 0))

    def add(self, piece: Piece, num_bytes: int) -> None:
        self._pieces.append(piece)
        self.num_rows += piece.stop - piece.start
        self._num_bytes += num_bytes

    def finish(self) -> ShardTask:
        task = ShardTask(self._split, self._number, tuple(self._pieces), self._job)
        self._number += 1
        self._begin()
        return task


def _row_bytes(chunk: int, num_rows: int, job: ShardJob) -> NDArray[np.int64]:
    """Bytes of each row of a chunk in a shard."""
    row_bytes = np.full(num_rows, fixed_row_bytes(job.schema), np.int64)
    numbers = [number for number, column in enumerate(job.schema.categorical) if column.multi_hot]
    if numbers:
        with ArrayFile(job.stage.chunk_path(chunk)) as file:
            for number in numbers:
                row_bytes += _ID_BYTES * file.read(f"lengths_{number}").astype(np.int64)
    return row_bytes


def fixed_row_bytes(schema: Schema) -> int:
    """Bytes of a row without the ids of its bags: label, dense values, an id or an offset a feature."""
    return 1 + _ID_BYTES * (len(schema.dense) + len(schema.categorical))


def _row_ends_per_split(rule: SplitRule, first_row: int, row_bytes: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Of each split's rows in a chunk, one after the other: where each begins in bytes, and the end of the last."""
    only = rule.contiguous_split(first_row, len(row_bytes))
    splits = None if only is not None else rule.split_of(first_row, len(row_bytes))
    for split in range(NUM_SPLITS):
        if splits is None:
            chosen = row_bytes if split == only else row_bytes[:0]
        else:
            chosen = row_bytes[splits == split]
        yield np.concatenate([np.zeros(1, np.int64), np.cumsum(chosen)])


def write_split_shard(task: ShardTask) -> WrittenShard:
    """Write one shard, unless it is there."""
    done_path = task.job.stage.shard_path(task.split, task.number)
    if (done := _done(task, done_path)) is not None:
        return done
    columns = _gather(task)
    file = f"{SPLITS[task.split]}/{task.number:05d}.arrow"
    info = write_shard(columns, task.job.schema, task.job.output, file)
    num_positives = int(columns.labels.sum(dtype=np.int64))
    meta = {"input_crc32": task.job.input_crc32, "info": info.model_dump(), "num_positives": num_positives}
    write_arrays(done_path, {}, meta)
    return WrittenShard(task.split, info, num_positives)


def _done(task: ShardTask, path: str) -> WrittenShard | None:
    """Return a finished shard of the same input, if its file is still whole."""
    if not os.path.exists(path):
        return None
    with ArrayFile(path) as file:
        info = ShardInfo.model_validate(file.meta["info"])
        is_same = file.meta["input_crc32"] == task.job.input_crc32
        written = WrittenShard(task.split, info, file.meta["num_positives"])
    shard = os.path.join(task.job.output, info.file)
    is_same = is_same and os.path.isfile(shard) and file_crc32(shard) == info.crc32
    return written if is_same else None


def _gather(task: ShardTask) -> Columns:
    num_rows = sum(piece.stop - piece.start for piece in task.pieces)
    labels = np.empty(num_rows, np.uint8)
    dense = np.empty((num_rows, len(task.job.schema.dense)), np.float32)
    columns = [_ColumnGatherer(task, c, num_rows) for c in range(len(task.job.schema.categorical))]
    done = 0
    for piece in task.pieces:
        rows = _rows_of(piece, task)
        stop = done + piece.stop - piece.start
        with ArrayFile(task.job.stage.chunk_path(piece.chunk)) as file:
            labels[done:stop] = file.read("labels")[rows]
            dense[done:stop] = file.read("dense").reshape(piece.num_rows, dense.shape[1])[rows]
            for column in columns:
                column.add(file, piece.chunk, rows, done, stop)
        done = stop
    return Columns(labels, dense, tuple(column.finish() for column in columns))


def _rows_of(piece: Piece, task: ShardTask) -> slice | NDArray[np.int64]:
    """Rows of the chunk, as a slice where they are all in one split."""
    if task.job.rule.contiguous_split(piece.first_row, piece.num_rows) is not None:
        return slice(piece.start, piece.stop)
    splits = task.job.rule.split_of(piece.first_row, piece.num_rows)
    return np.flatnonzero(splits == task.split)[piece.start : piece.stop]


class _ColumnGatherer:
    """Collects the ids of one column from chunk after chunk."""

    def __init__(self, task: ShardTask, number: int, num_rows: int) -> None:
        self._number = number
        self._ids_path = task.job.stage.ids_path(number)
        self._column_path = task.job.stage.column_path(number)
        with ArrayFile(self._column_path) as file:
            self._offsets: NDArray[np.int64] = file.read("offsets")
            self._checksums: NDArray[np.uint32] = file.read("checksums")
        self._is_multi_hot = task.job.schema.categorical[number].multi_hot
        self._ids = np.empty(0 if self._is_multi_hot else num_rows, np.int32)
        self._parts: list[NDArray[np.int32]] = []
        self._lengths = np.zeros(num_rows if self._is_multi_hot else 0, np.int32)

    def add(self, file: ArrayFile, chunk: int, rows: slice | NDArray[np.int64], start: int, stop: int) -> None:
        begin, end = int(self._offsets[chunk]), int(self._offsets[chunk + 1])
        table = np.fromfile(self._ids_path, np.int32, end - begin, offset=begin * 4)
        if zlib.crc32(table.data.cast("B")) != self._checksums[chunk]:
            raise PreprocessError(
                f"work in progress is damaged: {self._ids_path} is not as it was written (its checksum differs); "
                f"delete {self._column_path} and give the same command again, which makes both anew"
            )
        codes = file.read(f"codes_{self._number}")
        if not self._is_multi_hot:
            # The codes are below the table's length by construction; clip only spares the check.
            np.take(table, codes[rows], out=self._ids[start:stop], mode="clip")
            return
        lengths = file.read(f"lengths_{self._number}")
        is_in = np.zeros(len(lengths), np.bool_)
        is_in[rows] = True
        self._lengths[start:stop] = lengths[rows]
        self._parts.append(table[codes[np.repeat(is_in, lengths)]])

    def finish(self) -> Bags:
        if not self._is_multi_hot:
            return Bags(self._ids)
        offsets: NDArray[Any] = np.zeros(len(self._lengths) + 1, np.int64)
        np.cumsum(self._lengths, out=offsets[1:])
        return Bags(np.concatenate([np.empty(0, np.int32), *self._parts]), offsets.astype(np.int32))
