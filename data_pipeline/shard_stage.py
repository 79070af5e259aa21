"""Third stage: staged chunks and key-to-id tables to the shards of each split."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.array_file import ArrayFile, write_arrays
from data_pipeline.bad_rows import PreprocessError
from data_pipeline.manifest import SPLITS, ShardInfo
from data_pipeline.schema import Schema
from data_pipeline.shards import Bags, Columns, file_crc32, write_shard
from data_pipeline.splits import NUM_SPLITS, SplitRule
from data_pipeline.stage import Stage


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
    """Yield all shards; where they are cut depends on the rows alone, not on the chunks."""
    pieces: list[list[Piece]] = [[] for _ in range(NUM_SPLITS)]
    room = [rows_per_shard] * NUM_SPLITS
    numbers = [0] * NUM_SPLITS
    first_row = 0
    for chunk, num_rows in enumerate(chunk_rows):
        for split, available in enumerate(_rows_per_split(job.rule, first_row, num_rows)):
            start = 0
            while start < available:
                stop = min(available, start + room[split])
                pieces[split].append(Piece(chunk, first_row, num_rows, start, stop))
                room[split] -= stop - start
                start = stop
                if room[split] == 0:
                    yield ShardTask(split, numbers[split], tuple(pieces[split]), job)
                    pieces[split], room[split] = [], rows_per_shard
                    numbers[split] += 1
        first_row += num_rows
    for split in range(NUM_SPLITS):
        if pieces[split]:
            yield ShardTask(split, numbers[split], tuple(pieces[split]), job)


def _rows_per_split(rule: SplitRule, first_row: int, num_rows: int) -> list[int]:
    only = rule.contiguous_split(first_row, num_rows)
    if only is not None:
        return [num_rows if split == only else 0 for split in range(NUM_SPLITS)]
    counts: list[int] = np.bincount(rule.split_of(first_row, num_rows), minlength=NUM_SPLITS).tolist()
    return counts


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
