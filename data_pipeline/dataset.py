"""A data set on disk, opened for reading: its manifest, and its shards as memory-mapped columns."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from papilio.data_pipeline.manifest import DatasetError, Manifest, SplitInfo, read_manifest
from papilio.data_pipeline.paths import join
from papilio.data_pipeline.schema import Schema
from papilio.data_pipeline.shards import Columns, open_shard


class Split:
    """The rows of one split, numbered over its shards: shard i holds rows `row_bounds[i]` to `row_bounds[i + 1]`."""

    def __init__(self, name: str, folder: str, schema: Schema, info: SplitInfo, *, verify_checksums: bool) -> None:
        self.name = name
        self.info = info
        self.row_bounds = np.cumsum([0, *(shard.num_rows for shard in info.shards)], dtype=np.int64)
        self._folder = folder
        self._schema = schema
        self._verify_checksums = verify_checksums
        self._opened: dict[int, Columns] = {}
        self._lock = threading.Lock()

    @property
    def num_rows(self) -> int:
        """Rows over all shards."""
        return self.info.num_rows

    def shard_path(self, index: int) -> str:
        """Path of shard `index`, for messages."""
        return join(self._folder, self.info.shards[index].file)

    def shard(self, index: int) -> Columns:
        """Return the columns of shard `index`; opened, and checked against its checksum, at the first call.

        Raises:
            DatasetError: the shard is missing or is not the one that the manifest describes.
        """
        with self._lock:
            if index not in self._opened:
                self._opened[index] = self._open(index)
            return self._opened[index]

    def _open(self, index: int) -> Columns:
        info = self.info.shards[index]
        columns = open_shard(info, self._schema, self._folder, verify_checksum=self._verify_checksums)
        if columns.num_rows != info.num_rows:
            raise DatasetError(
                f"shard {self.shard_path(index)} holds {columns.num_rows} rows, the manifest says {info.num_rows}; "
                "restore it or preprocess the data again"
            )
        return columns


@dataclass(frozen=True)
class Dataset:
    """A complete data set; shards are opened when first read."""

    folder: str
    manifest: Manifest
    verify_checksums: bool = True

    @property
    def schema(self) -> Schema:
        """The columns."""
        return self.manifest.data_schema

    @property
    def num_embeddings(self) -> dict[str, int]:
        """Rows that each categorical column's table needs, in schema order."""
        stats = self.manifest.categorical_stats
        return {name: stats[name].num_embeddings for name in self.schema.categorical_names}

    def require_dense_columns(self) -> None:
        """Check that there is something for the bottom MLP of all models.

        Raises:
            DatasetError: there is no dense column.
        """
        if not self.schema.dense:
            raise DatasetError(
                f"data set {self.folder} has no dense column; the bottom MLP needs at least one: add [[dense]] with "
                "the name of a numeric column to the schema (where the table has none, add one to it, such as 0 in "
                "every row) and preprocess again"
            )

    def has_rows(self, split: str) -> bool:
        """Say whether there is such a split with rows in it."""
        info = self.manifest.splits.get(split)
        return info is not None and info.num_rows > 0

    def open_split(self, name: str) -> Split:
        """Return a split for reading.

        Raises:
            DatasetError: there is no such split, it has no rows, or its shards do not add up to its rows.
        """
        info = self.manifest.splits.get(name)
        if info is None or not self.has_rows(name):
            filled = [split for split, found in self.manifest.splits.items() if found.num_rows]
            raise DatasetError(
                f"data set {self.folder} has no rows in split {name!r}; splits with rows: "
                f"{', '.join(filled) or 'none'} (split rule: {self.manifest.split_rule})"
            )
        num_rows = sum(shard.num_rows for shard in info.shards)
        if num_rows != info.num_rows:
            raise DatasetError(
                f"data set {self.folder}: the shards of split {name!r} hold {num_rows} rows, the split is said to have "
                f"{info.num_rows}; its manifest was changed: preprocess the data again"
            )
        return Split(name, self.folder, self.schema, info, verify_checksums=self.verify_checksums)


def open_dataset(folder: str, *, verify_checksums: bool = True) -> Dataset:
    """Open a data set for reading; reads its manifest only.

    Raises:
        DatasetError: it is not complete, or its manifest cannot be used (see `read_manifest`).
    """
    manifest = read_manifest(folder)
    missing = set(manifest.data_schema.categorical_names) - set(manifest.categorical_stats)
    if missing:
        raise DatasetError(
            f"the manifest of {folder} has no statistics of column(s) {', '.join(sorted(missing))}, so their number of "
            "embeddings is not known; preprocess the data again"
        )
    return Dataset(folder, manifest, verify_checksums)
