"""Second stage: a vocabulary (or none, for hashed ids) and the statistics of each categorical column."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from papilio.data_pipeline.array_file import ArrayFile, write_arrays
from papilio.data_pipeline.id_mapper import IdMapper
from papilio.data_pipeline.manifest import CategoricalStats
from papilio.data_pipeline.preprocess.key_runs import KeyRuns
from papilio.data_pipeline.preprocess.splits import SplitRule
from papilio.data_pipeline.preprocess.stage_folder import Stage
from papilio.data_pipeline.preprocess.vocabulary import Vocabulary, save_vocabulary, vocabulary_file
from papilio.data_pipeline.schema import MISSING_ID, UNKNOWN_ID, CategoricalColumn
from papilio.data_pipeline.shards import file_crc32

_SMALL_COUNT = 1 << 16
_POSITION_BITS = 28
_COUNT_BITS = 64 - _POSITION_BITS
# Keys held above `max_ids`, or a tenth of it if that is more, before the rarest are dropped.
_MIN_SLACK_KEYS = 1 << 21
_BLOCK_KEYS = 1 << 20


@dataclass(frozen=True)
class ColumnTask:
    """One categorical column to finish."""

    number: int
    column: CategoricalColumn
    stage: Stage
    output: str
    chunk_rows: list[int]
    rule: SplitRule
    input_crc32: int


def build_column(task: ColumnTask) -> CategoricalStats:
    """Count, rank and map the ids of a column: writes its vocabulary, each chunk's key-to-id table, its statistics."""
    done_path = task.stage.column_path(task.number)
    if (done := _done(task, done_path)) is not None:
        return done
    with KeyRuns(task.stage, task.number, task.chunk_rows, task.rule) as runs:
        skew = _SkewCounter()
        keys_by_rank = _count_and_rank(task.column, runs, skew)
        vocabulary = Vocabulary(keys_by_rank) if task.column.encoding == "vocabulary" else None
        num_unknown, checksums = _write_ids(task, runs, IdMapper(task.column, vocabulary))
        stats = _stats(task, runs, vocabulary, skew, num_unknown)
        meta = {"input_crc32": task.input_crc32, "stats": stats.model_dump()}
        write_arrays(done_path, {"offsets": runs.offsets, "checksums": checksums}, meta)
    return stats


def _done(task: ColumnTask, path: str) -> CategoricalStats | None:
    """Return what was found out of a finished column of the same input, if its vocabulary is still whole."""
    if not os.path.exists(path):
        return None
    with ArrayFile(path) as file:
        stats = CategoricalStats.model_validate(file.meta["stats"])
        is_same = file.meta["input_crc32"] == task.input_crc32
    if stats.vocabulary_file is not None:
        vocabulary = os.path.join(task.output, stats.vocabulary_file)
        is_same = is_same and os.path.isfile(vocabulary) and file_crc32(vocabulary) == stats.vocabulary_crc32
    return stats if is_same else None


def _count_and_rank(column: CategoricalColumn, runs: KeyRuns, skew: _SkewCounter) -> NDArray[Any] | pa.Array:
    """Count every key for the statistics; return those a vocabulary keeps (for hashed ids none is asked for)."""
    ranking = _Ranking(column)
    for part in runs.merged():
        skew.add(part.all_counts)
        if column.encoding == "vocabulary":
            ranking.add(part.keys, part.train_counts)
    return ranking.keys_by_rank()


def _write_ids(task: ColumnTask, runs: KeyRuns, mapper: IdMapper) -> tuple[int, NDArray[np.uint32]]:
    """Write the id of each code of each chunk; return how many values are unknown, and a checksum a chunk."""
    path = task.stage.ids_path(task.number)
    num_unknown, checksums = 0, []
    with open(f"{path}.{os.getpid()}.tmp", "wb") as file:
        for keys, counts in runs.keys_of_chunks():
            ids = mapper.ids_of_keys(keys)
            num_unknown += int(counts[:-1][ids == UNKNOWN_ID].sum(dtype=np.int64))
            data = ids.tobytes() + np.int32(MISSING_ID).tobytes()
            checksums.append(zlib.crc32(data))
            file.write(data)
    os.replace(f"{path}.{os.getpid()}.tmp", path)
    return num_unknown, np.array(checksums, np.uint32)


def _stats(
    task: ColumnTask, runs: KeyRuns, vocabulary: Vocabulary | None, skew: _SkewCounter, num_unknown: int
) -> CategoricalStats:
    num_rows = sum(task.chunk_rows)
    column = task.column
    file = crc32 = None
    if vocabulary is not None:
        file = vocabulary_file(column.name, column.kind)
        crc32 = save_vocabulary(vocabulary.keys_by_rank, task.output, file)
    num_empty = _num_empty_bags(task) if column.multi_hot else runs.num_missing
    return CategoricalStats(
        # A vocabulary without ids has length 0, which is falsy.
        num_embeddings=column.num_fixed_rows if vocabulary is None else vocabulary.num_embeddings,
        cardinality=skew.num_distinct,
        missing_rate=num_empty / num_rows,
        unknown_rate=num_unknown / max(runs.num_values, 1),
        mean_ids_per_sample=runs.num_values / num_rows,
        skew=skew.share_of_top_percent(),
        vocabulary_file=file,
        vocabulary_crc32=crc32,
    )


def _num_empty_bags(task: ColumnTask) -> int:
    num_empty = 0
    for chunk in range(len(task.chunk_rows)):
        with ArrayFile(task.stage.chunk_path(chunk)) as file:
            num_empty += int(np.count_nonzero(file.read(f"lengths_{task.number}") == 0))
    return num_empty


class _Ranking:
    """Keeps the most frequent keys while they come in ascending order, few more than `max_ids`."""

    def __init__(self, column: CategoricalColumn) -> None:
        self._column = column
        self._keys: list[Any] = []
        self._counts: list[NDArray[Any]] = []
        self._num_held = 0
        self._most_held = column.max_ids + max(column.max_ids // 10, _MIN_SLACK_KEYS)

    def add(self, keys: NDArray[Any] | pa.Array, train_counts: NDArray[np.int64]) -> None:
        kept = np.flatnonzero(train_counts >= self._column.frequency_threshold)
        self._keys.append(_take(keys, kept))
        is_small = train_counts.max(initial=0) < 1 << 32
        self._counts.append(train_counts[kept].astype(np.uint32 if is_small else np.int64))
        self._num_held += len(kept)
        if self._num_held > self._most_held:
            self._thin()

    def _thin(self) -> None:
        """Drop what cannot be among the most frequent, keeping the ascending order of keys."""
        self._counts = [np.concatenate(self._counts)]
        self._keys = [_concatenate(self._keys)]
        kept = _most_frequent(self._counts[0], self._column.max_ids)
        kept.sort()
        self._keys = [_take(self._keys[0], kept)]
        self._counts, self._num_held = [self._counts[0][kept]], len(kept)

    def keys_by_rank(self) -> NDArray[Any] | pa.Array:
        if not self._keys:
            dtype = np.uint32 if self._column.kind == "hex" else np.int64
            return pa.array([], pa.large_binary()) if self._column.kind == "string" else np.empty(0, dtype)
        self._thin()
        return _take(self._keys[0], _most_frequent(self._counts[0], self._column.max_ids))


def _most_frequent(counts: NDArray[Any], limit: int) -> NDArray[np.int64]:
    """Positions of the `limit` greatest counts, greatest first, earlier positions first among equals."""
    if len(counts) >= 1 << _POSITION_BITS or counts.max(initial=0) >= 1 << _COUNT_BITS:
        order: NDArray[np.int64] = np.argsort(-counts.astype(np.int64), kind="stable")
        return order[:limit]
    packed = np.subtract(np.uint64((1 << _COUNT_BITS) - 1), counts, dtype=np.uint64)
    packed <<= np.uint64(_POSITION_BITS)
    for start in range(0, len(counts), _BLOCK_KEYS):
        block = packed[start : start + _BLOCK_KEYS]
        block |= np.arange(start, start + len(block), dtype=np.uint64)
    packed.sort()
    packed &= np.uint64((1 << _POSITION_BITS) - 1)
    places: NDArray[np.int64] = packed[:limit].view(np.int64)
    return places


def _take(keys: NDArray[Any] | pa.Array, places: NDArray[np.int64]) -> Any:
    return keys.take(pa.array(places)) if isinstance(keys, pa.Array) else keys[places]


def _concatenate(parts: list[Any]) -> Any:
    return pa.concat_arrays(parts) if isinstance(parts[0], pa.Array) else np.concatenate(parts)


class _SkewCounter:
    """Counts distinct ids, and how often each count occurs, in little memory: most counts are small."""

    def __init__(self) -> None:
        self.num_distinct = 0
        self._num_with_count = np.zeros(_SMALL_COUNT, np.int64)
        self._large: list[NDArray[np.int64]] = []

    def add(self, counts: NDArray[np.int64]) -> None:
        is_small = counts < _SMALL_COUNT
        self.num_distinct += len(counts)
        self._num_with_count += np.bincount(counts[is_small], minlength=_SMALL_COUNT)
        self._large.append(counts[~is_small])

    def share_of_top_percent(self) -> float:
        """Share of all ids that falls on the most frequent 1 % of the distinct ones (rounded up)."""
        large = -np.sort(-np.concatenate([np.empty(0, np.int64), *self._large]))
        total = int(large.sum()) + int((self._num_with_count * np.arange(_SMALL_COUNT)).sum())
        wanted = -(-self.num_distinct // 100)
        top = int(large[:wanted].sum())
        rest = wanted - min(len(large), wanted)
        descending = self._num_with_count[::-1]
        taken = np.minimum(np.cumsum(descending), rest)
        top += int((np.diff(taken, prepend=0) * np.arange(_SMALL_COUNT)[::-1]).sum())
        return top / total if total else 0.0
