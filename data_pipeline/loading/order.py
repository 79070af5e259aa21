"""The order in which samples are read: a pure function of (seed, epoch), the same for every number of ranks.

Rows are shuffled by blocks of consecutive rows, so that a block is one contiguous copy per column. The permutation of
the blocks is computed, never stored: any part of an epoch's order can be had at once, at any size of data set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from papilio.data_pipeline.mixing import key_of, mix64

NUM_FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class ReadPosition:
    """Where reading stands: `sample` samples of epoch `epoch` have been consumed, by all ranks together.

    After the last sample of an epoch the position is the beginning of the next one.
    """

    epoch: int = 0
    sample: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return the position as plain numbers, for a checkpoint."""
        return {"epoch": self.epoch, "sample": self.sample}

    @classmethod
    def from_dict(cls, state: Mapping[str, int]) -> ReadPosition:
        """Rebuild a position from `to_dict`'s result."""
        return cls(epoch=int(state["epoch"]), sample=int(state["sample"]))


@dataclass(frozen=True)
class Runs:
    """Rows as runs of consecutive ones: run i is rows `starts[i]` to `starts[i] + lengths[i]`. Both int64."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def rows(self) -> NDArray[np.int64]:
        """Every row, one by one."""
        ends = np.cumsum(self.lengths)
        shifts = self.starts - (ends - self.lengths)
        rows: NDArray[np.int64] = np.arange(self.lengths.sum(), dtype=np.int64) + np.repeat(shifts, self.lengths)
        return rows


@dataclass(frozen=True)
class EpochOrder:
    """The order of `num_rows` rows in one epoch: blocks of `block_rows` rows, shuffled by (seed, epoch).

    `block_rows` = 1 is a permutation of single rows. Without `shuffle` the order is that of the rows.
    """

    num_rows: int
    seed: int
    epoch: int
    shuffle: bool = True
    block_rows: int = 64

    def rows_of(self, start: int, stop: int) -> Runs:
        """Return the rows at places `start` to `stop` (exclusive) of the order; needs no earlier place."""
        if not 0 <= start <= stop <= self.num_rows:
            raise ValueError(f"places {start} to {stop} are not within the {self.num_rows} rows of the epoch")
        if start == stop or not self.shuffle:
            length = [stop - start] if stop > start else []
            return Runs(np.array([start] * len(length), np.int64), np.array(length, np.int64))
        return self._shuffled_rows_of(start, stop)

    def _shuffled_rows_of(self, start: int, stop: int) -> Runs:
        # Full blocks are permuted; the rest of the rows, too few for a block, come at a slot of their own.
        num_blocks, num_rest = divmod(self.num_rows, self.block_rows)
        rest_slot = key_of(self.seed, "rest slot", self.epoch) % (num_blocks + 1)
        gap = self.block_rows - num_rest

        first = start // self.block_rows
        slots = np.arange(first, (stop + gap - 1) // self.block_rows + 1, dtype=np.int64)
        begins = slots * self.block_rows - gap * (slots > rest_slot)
        ends = (slots + 1) * self.block_rows - gap * (slots >= rest_slot)
        blocks = slots - (slots > rest_slot)
        is_rest = slots == rest_slot
        starts = np.empty_like(slots)
        starts[is_rest] = num_blocks * self.block_rows
        key = key_of(self.seed, "block order", self.epoch)
        # The last slot can lie one past the end; the clipping below makes it empty, so any block will do.
        moved = permute(np.minimum(blocks[~is_rest], max(num_blocks - 1, 0)), num_blocks, key)
        starts[~is_rest] = moved * self.block_rows

        clipped_begins = np.clip(begins, start, stop)
        lengths = np.clip(ends, start, stop) - clipped_begins
        is_used = lengths > 0
        return Runs((starts + clipped_begins - begins)[is_used], lengths[is_used])


def permute(indices: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Map each index in [0, size) through a keyed bijection on [0, size), in O(1) memory.

    A Feistel network on (index // width, index % width), whose round functions add modulo the number of rows or
    columns (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002); images outside [0, size) are mapped again.
    """
    width = max(1, math.isqrt(max(size - 1, 0)) + 1)
    height = -(-size // width)
    images = indices.astype(np.int64)
    is_outside = np.ones(len(images), bool)
    while is_outside.any():
        images[is_outside] = _feistel(images[is_outside], np.uint64(height), np.uint64(width), key)
        is_outside = images >= size
    return images


def num_batches(num_rows: int, global_batch_size: int) -> int:
    """Count an epoch's batches; the last one may be short."""
    return -(-num_rows // global_batch_size)


def batch_range(sample: int, num_rows: int, global_batch_size: int) -> tuple[int, int]:
    """Return the places (start, stop) of the global batch that begins at place `sample`.

    Batches begin at multiples of the batch size; a batch begun elsewhere (the size was changed) ends at the next one.
    """
    return sample, min((sample // global_batch_size + 1) * global_batch_size, num_rows)


def rank_range(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return a rank's contiguous part of the places `start` to `stop`; parts differ by one sample at most."""
    size = stop - start
    return start + rank * size // world_size, start + (rank + 1) * size // world_size


def _feistel(values: NDArray[np.int64], height: np.uint64, width: np.uint64, key: int) -> NDArray[np.int64]:
    left, right = np.divmod(values.astype(np.uint64), width)
    for number in range(NUM_FEISTEL_ROUNDS):
        round_key = np.uint64(key_of(key, number))
        if number % 2 == 0:
            left = (left + mix64(right ^ round_key) % height) % height
        else:
            right = (right + mix64(left ^ round_key) % width) % width
    return (left * width + right).astype(np.int64)
