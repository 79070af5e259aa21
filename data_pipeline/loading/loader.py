"""From shards to batches: rows are taken column by column into feature-major buffers, never one by one in Python."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from papilio.data_pipeline.config import DataConfig
from papilio.data_pipeline.dataset import Dataset, Split
from papilio.data_pipeline.loading.batch import Batch
from papilio.data_pipeline.loading.order import EpochOrder, ReadPosition, Runs, batch_range, num_batches, rank_range
from papilio.data_pipeline.loading.prefetch import prefetch
from papilio.data_pipeline.manifest import DatasetError
from papilio.data_pipeline.shards import Columns


@dataclass(frozen=True)
class _Part:
    """The rows of a batch that one shard holds: rows `rows` of `columns` become places `start` to `stop`."""

    shard: int
    columns: Columns
    rows: NDArray[np.int64]
    start: int
    stop: int


class Loader:
    """Iterates a rank's batches of one split, from a position to the end of an epoch; each `iter()` starts anew.

    All ranks get the same number of batches, of the same size (short slices are padded). A batch is a set: its rows
    come in the order of the shards, whatever order they were drawn in.

    Attributes:
        wait_s: seconds that the consumer has waited for batches since the latest `iter()`.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        config: DataConfig,
        *,
        global_batch_size: int,
        seed: int = 0,
        shuffle: bool | None = None,
        start: ReadPosition | None = None,
        num_epochs: int = 1,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        """Make a loader; no shard is opened yet.

        Args:
            dataset: what to read.
            split: its split, for example "train".
            config: how to read.
            global_batch_size: samples of a batch, over all ranks.
            seed: with the epoch, decides the order.
            shuffle: overrides `config.shuffle`; evaluation reads in order.
            start: where to begin; the beginning of epoch 0 when None.
            num_epochs: the epoch to stop before, counted from epoch 0 (not from `start`).
            rank: whose slices to read.
            world_size: number of slices of a batch.
            pin_memory: build batches in page-locked memory, for copies to a GPU beside its work.

        Raises:
            DatasetError: the split has no rows, or `start` lies beyond it.
        """
        self.wait_s = 0.0
        self._split = dataset.open_split(split)
        self._config = config
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._shuffle = config.shuffle if shuffle is None else shuffle
        self._start = _checked_start(start or ReadPosition(), self._split, dataset.folder)
        self._num_epochs = num_epochs
        self._rank = rank
        self._world_size = world_size
        self._gatherer = _Gatherer(dataset, self._split, pin_memory=pin_memory)

    @property
    def num_samples_per_epoch(self) -> int:
        """Samples of an epoch, over all ranks."""
        return self._split.num_rows

    @property
    def num_batches_per_epoch(self) -> int:
        """Batches of a whole epoch; the same for every rank."""
        return num_batches(self._split.num_rows, self._global_batch_size)

    def __len__(self) -> int:
        """Batches of one iteration, from the start position on."""
        num_consumed = self._start.sample // self._global_batch_size
        return max(0, (self._num_epochs - self._start.epoch) * self.num_batches_per_epoch - num_consumed)

    def check_first_batch(self) -> None:
        """Read the first batch and drop it, so that faults of its shards are found before a model is built.

        Raises:
            DatasetError: a shard is missing, was changed, or holds ids out of range.
        """
        batches = self._batches()
        next(batches, None)
        batches.close()

    def __iter__(self) -> Generator[Batch, None, None]:
        """Iterate; closing or dropping the iterator ends its thread."""
        self.wait_s = 0.0
        batches = self._batches()
        if self._config.prefetch_batches:
            batches = prefetch(batches, self._config.prefetch_batches)
        try:
            while True:
                begin_s = time.perf_counter()
                batch = next(batches, None)
                self.wait_s += time.perf_counter() - begin_s
                if batch is None:
                    return
                yield batch
        finally:
            batches.close()

    def _batches(self) -> Generator[Batch, None, None]:
        num_rows = self._split.num_rows
        sample = self._start.sample
        for epoch in range(self._start.epoch, self._num_epochs):
            order = EpochOrder(num_rows, self._seed, epoch, self._shuffle, self._config.shuffle_block_rows)
            while sample < num_rows:
                start, stop = batch_range(sample, num_rows, self._global_batch_size)
                rows = order.rows_of(*rank_range(start, stop, self._rank, self._world_size))
                position = ReadPosition(epoch, stop) if stop < num_rows else ReadPosition(epoch + 1, 0)
                dense, sparse, labels = self._gatherer.gather(rows)
                batch = Batch(dense, sparse, labels, position, stop - start, len(labels))
                yield batch.padded_to(-(-(stop - start) // self._world_size))
                sample = stop
            sample = 0


class _Gatherer:
    """Takes rows of a split into new tensors."""

    def __init__(self, dataset: Dataset, split: Split, *, pin_memory: bool) -> None:
        self._split = split
        self._columns = dataset.schema.categorical
        self._keys = dataset.schema.categorical_names
        self._num_dense = len(dataset.schema.dense)
        self._num_embeddings = list(dataset.num_embeddings.values())
        self._has_multi_hot = any(column.multi_hot for column in self._columns)
        self._pin_memory = pin_memory
        self._ones = torch.empty(0, dtype=torch.int32)

    def gather(self, runs: Runs) -> tuple[torch.Tensor, KeyedJaggedTensor, torch.Tensor]:
        """Return dense features [B, I], sparse features and labels [B] of the rows in `runs`, in the shards' order."""
        by_row = np.argsort(runs.starts)
        rows = Runs(runs.starts[by_row], runs.lengths[by_row]).rows
        parts = list(self._parts(rows))
        size = len(rows)
        dense = self._empty(size * self._num_dense, torch.float32).view(size, self._num_dense)
        labels = self._empty(size, torch.float32)
        dense_BI, labels_B = dense.numpy(), labels.numpy()
        for part in parts:
            # "clip" takes straight into `out`, "raise" by way of a buffer; no row is ever outside.
            part.columns.dense.take(part.rows, axis=0, out=dense_BI[part.start : part.stop], mode="clip")
            labels_B[part.start : part.stop] = part.columns.labels[part.rows]
        return dense, self._gather_sparse(parts, size), labels

    def _parts(self, rows: NDArray[np.int64]) -> Iterator[_Part]:
        bounds = self._split.row_bounds
        places = np.searchsorted(rows, bounds)
        for shard in np.flatnonzero(np.diff(places)):
            start, stop = int(places[shard]), int(places[shard + 1])
            yield _Part(int(shard), self._split.shard(int(shard)), rows[start:stop] - bounds[shard], start, stop)

    def _gather_sparse(self, parts: list[_Part], size: int) -> KeyedJaggedTensor:
        lengths, positions = self._bags(parts, size)
        lengths_FB = lengths.view(len(self._keys), size)
        per_feature = lengths_FB.sum(1).tolist() if self._has_multi_hot else [size] * len(self._keys)
        offsets = np.cumsum([0, *per_feature]).tolist()
        values = self._empty(offsets[-1], torch.int32)
        values_V = values.numpy()
        stop = 0
        for feature, places in enumerate(positions):
            for part, places_of_part in zip(parts, places, strict=True):
                start, stop = stop, stop + len(places_of_part)
                part.columns.bags[feature].ids.take(places_of_part, out=values_V[start:stop], mode="clip")
            self._check_ids(feature, values_V[offsets[feature] : stop], parts)
        return KeyedJaggedTensor(
            keys=self._keys,
            values=values,
            lengths=lengths,
            stride=size,
            length_per_key=per_feature,
            offset_per_key=offsets,
        )

    def _bags(self, parts: list[_Part], size: int) -> tuple[torch.Tensor, list[list[NDArray[np.int64]]]]:
        """Return the lengths [F * B], and by feature and part the places of the ids in the part's column."""
        one_hot = [part.rows for part in parts]
        if not self._has_multi_hot:
            return self._one_hot_lengths(size), [one_hot] * len(self._keys)
        lengths = self._empty(len(self._keys) * size, torch.int32)
        lengths_FB = lengths.view(len(self._keys), size).numpy()
        positions = []
        for feature, column in enumerate(self._columns):
            if not column.multi_hot:
                lengths_FB[feature] = 1
                positions.append(one_hot)
                continue
            positions.append([_bag_positions(part, feature, lengths_FB[feature]) for part in parts])
        return lengths, positions

    def _one_hot_lengths(self, size: int) -> torch.Tensor:
        # All batches of one-hot features share one tensor of ones: it is never written to.
        num_lengths = len(self._keys) * size
        if len(self._ones) < num_lengths:
            self._ones = self._empty(num_lengths, torch.int32).fill_(1)
        return self._ones[:num_lengths]

    def _check_ids(self, feature: int, ids: NDArray[np.int32], parts: list[_Part]) -> None:
        # Read as unsigned, a negative id is a huge one: one pass finds both.
        limit = self._num_embeddings[feature]
        if not ids.size or ids.view(np.uint32).max() < limit:
            return
        for part in parts:
            bags = part.columns.bags[feature]
            place = int(np.argmax(bags.ids.view(np.uint32) >= limit))
            if not 0 <= bags.ids[place] < limit:
                row = place if bags.offsets is None else int(np.searchsorted(bags.offsets, place, "right")) - 1
                raise DatasetError(
                    f"shard {self._split.shard_path(part.shard)}, column {self._keys[feature]}, row {row}: id "
                    f"{bags.ids[place]} is not within [0, {limit}), the column's num_embeddings; preprocess the data "
                    "again"
                )

    def _empty(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=self._pin_memory)


def _bag_positions(part: _Part, feature: int, lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    offsets = part.columns.bags[feature].offsets
    assert offsets is not None
    starts = offsets[part.rows].astype(np.int64)
    sizes = offsets[part.rows + 1] - starts
    lengths[part.start : part.stop] = sizes
    return Runs(starts, sizes).rows


def _checked_start(start: ReadPosition, split: Split, folder: str) -> ReadPosition:
    if start.epoch < 0 or not 0 <= start.sample <= split.num_rows:
        raise DatasetError(
            f"cannot continue at sample {start.sample} of epoch {start.epoch}: split {split.name!r} of {folder} has "
            f"{split.num_rows} samples; continue with the data set that the run was started on"
        )
    return start if start.sample < split.num_rows else ReadPosition(start.epoch + 1, 0)
