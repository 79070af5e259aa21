"""Held-out samples as a packaged model takes them: blocks of a split's rows, in their order, straight from the shards.

Needs neither torchrec nor the training loader; a block is a slice of each column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from papilio.data_pipeline.dataset import Dataset, Split
from papilio.data_pipeline.manifest import DatasetError

BLOCK_ROWS = 4096
# Scores, labels and their ranks take some 100 bytes a sample; this many tell AUCs apart that differ by a few 1e-6.
MAX_GATE_SAMPLES = 1 << 22


@dataclass(frozen=True)
class Block:
    """Consecutive samples: `dense` [B, I] float32, `ids` [V] and `lengths` [F * B] int32 by feature, `labels` [B]."""

    dense: torch.Tensor
    ids: torch.Tensor
    lengths: torch.Tensor
    labels: NDArray[np.uint8]


@dataclass(frozen=True)
class HeldOut:
    """Samples that the model was not trained on.

    Attributes:
        dataset: what to read; its columns are those of the run's.
        split: its split.
        max_samples: how many to use, None for all; blocks of rows are then taken evenly over the split.
    """

    dataset: Dataset
    split: str
    max_samples: int | None = None

    @classmethod
    def for_gate(cls, dataset: Dataset) -> HeldOut:
        """Return what to certify on: the test split, or the validation split where that is empty.

        Raises:
            DatasetError: the data set has neither.
        """
        return cls(dataset, _first_with_rows(dataset, ("test", "validation")), MAX_GATE_SAMPLES)

    @classmethod
    def for_search(cls, dataset: Dataset) -> HeldOut:
        """Return what to choose precisions on: the validation split, or the test split where that is empty.

        What is chosen on samples looks better on them than it is.

        Raises:
            DatasetError: the data set has neither.
        """
        return cls(dataset, _first_with_rows(dataset, ("validation", "test")), MAX_GATE_SAMPLES)

    @property
    def num_rows(self) -> int:
        """Rows of the whole split."""
        return self._rows.num_rows

    @property
    def num_samples(self) -> int:
        """Rows that are read."""
        return sum(min(start + BLOCK_ROWS, self.num_rows) - start for start in self._starts)

    def describe(self) -> str:
        """Say in words what is read."""
        some = f"{self.num_samples:,}" if self.num_samples == self.num_rows else f"{self.num_samples:,} of "
        whole = "" if self.num_samples == self.num_rows else f"{self.num_rows:,}"
        return f"{some}{whole} samples of split {self.split} of {self.dataset.folder}"

    def blocks(self) -> Iterator[Block]:
        """Yield the samples, block after block; each pass reads the same ones.

        Raises:
            DatasetError: there is no such split, it has no rows, or a shard is missing or damaged.
        """
        for start in self._starts:
            stop = min(start + BLOCK_ROWS, self.num_rows)
            yield _joined([self._slice(start, stop, shard) for shard in self._shards(start, stop)])

    @cached_property
    def _rows(self) -> Split:
        return self.dataset.open_split(self.split)

    @cached_property
    def _starts(self) -> list[int]:
        num_blocks = -(-self.num_rows // BLOCK_ROWS)
        wanted = num_blocks if self.max_samples is None else max(1, -(-self.max_samples // BLOCK_ROWS))
        num_taken = min(num_blocks, wanted)
        return [number * num_blocks // num_taken * BLOCK_ROWS for number in range(num_taken)]

    def _shards(self, start: int, stop: int) -> range:
        bounds = self._rows.row_bounds
        return range(int(np.searchsorted(bounds, start, "right")) - 1, int(np.searchsorted(bounds, stop, "left")))

    def _slice(self, start: int, stop: int, shard: int) -> _Slice:
        columns = self._rows.shard(shard)
        begin = int(self._rows.row_bounds[shard])
        first, last = max(0, start - begin), min(stop - begin, columns.num_rows)
        ids, lengths = [], []
        for bags in columns.bags:
            if bags.offsets is None:
                ids.append(bags.ids[first:last])
                lengths.append(np.ones(last - first, np.int32))
            else:
                ids.append(bags.ids[bags.offsets[first] : bags.offsets[last]])
                lengths.append(np.diff(bags.offsets[first : last + 1]))
        return _Slice(columns.dense[first:last], columns.labels[first:last], ids, lengths)


@dataclass(frozen=True)
class _Slice:
    """A shard's part of a block; ids and lengths by feature."""

    dense: NDArray[np.float32]
    labels: NDArray[np.uint8]
    ids: list[NDArray[np.int32]]
    lengths: list[NDArray[np.int32]]


def _first_with_rows(dataset: Dataset, splits: Sequence[str]) -> str:
    for name in splits:
        if name in dataset.manifest.splits and dataset.manifest.splits[name].num_rows:
            return name
    raise DatasetError(
        f"data set {dataset.folder} has no rows in a test or validation split, so there is nothing held out to measure "
        "quality on; name a data set that has (--data DIR), preprocessed with the training data"
    )


def _joined(parts: list[_Slice]) -> Block:
    num_features = len(parts[0].ids)
    # Copies: the shards are mapped read-only, which torch would warn about.
    ids = np.concatenate([part.ids[feature] for feature in range(num_features) for part in parts])
    lengths = np.concatenate([part.lengths[feature] for feature in range(num_features) for part in parts])
    return Block(
        torch.from_numpy(np.concatenate([part.dense for part in parts])),
        torch.from_numpy(ids.astype(np.int32, copy=False)),
        torch.from_numpy(lengths.astype(np.int32, copy=False)),
        np.concatenate([part.labels for part in parts]),
    )
