"""The sorted keys of one column, chunk after chunk, merged into one sorted sequence with counts, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from papilio.data_pipeline.array_file import ArrayFile
from papilio.data_pipeline.preprocess.splits import SplitRule
from papilio.data_pipeline.preprocess.stage_folder import Stage, read_keys

# Keys merged at once: about 100 MB of arrays.
RANGE_KEYS = 1 << 21
_SAMPLED_KEYS = 1 << 20


@dataclass(frozen=True)
class KeyCounts:
    """Sorted distinct keys, how often each occurs in all rows and in the training split."""

    keys: NDArray[Any] | pa.Array
    all_counts: NDArray[np.int64]
    train_counts: NDArray[np.int64]


class KeyRuns:
    """Keys of one column in all chunks (a context manager: the training counts lie in a scratch file)."""

    def __init__(self, stage: Stage, column: int, chunk_rows: list[int], rule: SplitRule) -> None:
        self._stage, self._column, self._chunk_rows = stage, column, chunk_rows
        self._rule = rule
        self._scratch = stage.scratch_path(column)
        # offsets[k] is the first of chunk k's counts in the scratch file: one a key and one for missing values.
        self.offsets = np.zeros(len(chunk_rows) + 1, np.int64)
        self.num_missing = 0
        self.num_values = 0

    def __enter__(self) -> KeyRuns:
        first_row = 0
        with open(self._scratch, "wb") as scratch:
            for chunk, num_rows in enumerate(self._chunk_rows):
                with ArrayFile(self._stage.chunk_path(chunk)) as file:
                    counts = file.read(f"counts_{self._column}")
                    scratch.write(self._train_counts(file, counts, first_row, num_rows).tobytes())
                self.offsets[chunk + 1] = self.offsets[chunk] + len(counts)
                self.num_missing += int(counts[-1])
                self.num_values += int(counts.sum(dtype=np.int64))
                first_row += num_rows
        return self

    def __exit__(self, *_: object) -> None:
        os.remove(self._scratch)

    def _train_counts(
        self, file: ArrayFile, counts: NDArray[np.uint32], first_row: int, num_rows: int
    ) -> NDArray[np.uint32]:
        split = self._rule.contiguous_split(first_row, num_rows)
        if split is not None:
            return counts if split == 0 else np.zeros_like(counts)
        is_train = self._rule.split_of(first_row, num_rows) == 0
        if f"lengths_{self._column}" in file:
            is_train = np.repeat(is_train, file.read(f"lengths_{self._column}"))
        codes = file.read(f"codes_{self._column}")
        return np.bincount(codes[is_train], minlength=len(counts)).astype(np.uint32)

    def keys_of_chunks(self) -> Iterator[tuple[NDArray[Any] | pa.Array, NDArray[np.uint32]]]:
        """Yield each chunk's keys and counts in all rows (one more: of missing values)."""
        for chunk in range(len(self._chunk_rows)):
            with ArrayFile(self._stage.chunk_path(chunk)) as file:
                yield read_keys(file, self._column), file.read(f"counts_{self._column}")

    def merged(self) -> Iterator[KeyCounts]:
        """Yield all distinct keys in ascending order with their counts, part by part.

        Numbers are merged range by range, so that memory depends on RANGE_KEYS only; strings are folded together one
        chunk after the other, so that it depends on the number of distinct strings.
        """
        if not self._chunk_rows:
            return
        with ArrayFile(self._stage.chunk_path(0)) as file:
            is_binary = f"keys_{self._column}" not in file
        if is_binary:
            yield self._merge_strings()
            return
        bounds = self._range_bounds()
        for part in range(bounds.shape[1] - 1):
            pieces = [
                self._read_run(chunk, int(bounds[chunk, part]), int(bounds[chunk, part + 1]))
                for chunk in range(len(bounds))
                if bounds[chunk, part] < bounds[chunk, part + 1]
            ]
            if pieces:
                keys, all_counts, train_counts = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
                yield _merge_numbers(keys, all_counts, train_counts)

    def _range_bounds(self) -> NDArray[np.int64]:
        """[chunks, ranges + 1] positions that cut every chunk's keys at the same values."""
        sizes = np.diff(self.offsets) - 1
        num_ranges = max(1, -(-int(sizes.sum()) // RANGE_KEYS))
        bounds = np.zeros((len(sizes), num_ranges + 1), np.int64)
        bounds[:, -1] = sizes
        if num_ranges == 1:
            return bounds
        stride = max(1, int(sizes.sum()) // max(_SAMPLED_KEYS, 1))
        sample = np.sort(np.concatenate([self._read_keys(chunk)[::stride] for chunk in range(len(sizes))]))
        splitters = sample[np.arange(1, num_ranges) * len(sample) // num_ranges]
        for chunk in range(len(sizes)):
            bounds[chunk, 1:-1] = np.searchsorted(self._read_keys(chunk), splitters)
        return bounds

    def _read_keys(self, chunk: int) -> NDArray[Any]:
        with ArrayFile(self._stage.chunk_path(chunk)) as file:
            return file.read(f"keys_{self._column}")

    def _read_run(
        self, chunk: int, start: int, stop: int
    ) -> tuple[NDArray[Any], NDArray[np.uint32], NDArray[np.uint32]]:
        with ArrayFile(self._stage.chunk_path(chunk)) as file:
            keys = file.read(f"keys_{self._column}", start, stop)
            return keys, file.read(f"counts_{self._column}", start, stop), self._read_train(chunk, start, stop)

    def _read_train(self, chunk: int, start: int, stop: int) -> NDArray[np.uint32]:
        offset = (int(self.offsets[chunk]) + start) * 4
        return np.fromfile(self._scratch, np.uint32, stop - start, offset=offset)

    def _merge_strings(self) -> KeyCounts:
        merged: KeyCounts | None = None
        for chunk, (keys, counts) in enumerate(self.keys_of_chunks()):
            train = self._read_train(chunk, 0, len(keys)).astype(np.int64)
            part = KeyCounts(keys, counts[:-1].astype(np.int64), train)
            merged = part if merged is None else _fold_strings(merged, part)
        assert merged is not None
        order = pc.sort_indices(merged.keys)
        places = order.to_numpy()
        return KeyCounts(merged.keys.take(order), merged.all_counts[places], merged.train_counts[places])


def _merge_numbers(keys: NDArray[Any], all_counts: NDArray[np.uint32], train_counts: NDArray[np.uint32]) -> KeyCounts:
    if keys.dtype == np.uint32:
        packed = keys.astype(np.uint64) << np.uint64(32)
        packed |= np.arange(len(keys), dtype=np.uint64)
        packed.sort()
        order = (packed & np.uint64(0xFFFFFFFF)).view(np.int64)
        keys = (packed >> np.uint64(32)).astype(np.uint32)
    else:
        order = np.argsort(keys)
        keys = keys[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return KeyCounts(
        keys[first],
        np.add.reduceat(all_counts[order], first, dtype=np.int64),
        np.add.reduceat(train_counts[order], first, dtype=np.int64),
    )


def _fold_strings(merged: KeyCounts, part: KeyCounts) -> KeyCounts:
    encoded = pa.concat_arrays([merged.keys, part.keys]).dictionary_encode()
    codes = encoded.indices.to_numpy()
    num_keys = len(encoded.dictionary)

    def total(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
        # bincount adds in float64, which is exact below 2**53.
        return np.bincount(codes, np.concatenate([first, second]), num_keys).astype(np.int64)

    return KeyCounts(
        encoded.dictionary,
        total(merged.all_counts, part.all_counts),
        total(merged.train_counts, part.train_counts),
    )
