"""A shard: one uncompressed Arrow IPC file of one record batch, so a column is one memory-mapped NumPy array.

Columns: `label` (uint8), `dense` (fixed-size list of I float32, absent without dense columns), then one column per
categorical feature: int32 ids (one-hot) or a list of int32 whose offsets are the bag boundaries (multi-hot).
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from papilio.data_pipeline.inner_path import link_problem
from papilio.data_pipeline.manifest import DatasetError, ShardInfo
from papilio.data_pipeline.paths import join, path_manager, replace
from papilio.data_pipeline.schema import Schema

LABEL = "label"
DENSE = "dense"
CHECKSUM_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Bags:
    """A categorical column: `ids` [V] int32; `offsets` [N + 1] int32 bounds of each sample's bag, None when one-hot."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class Columns:
    """The rows of a shard as arrays: `labels` [N] uint8, `dense` [N, I] float32, one `Bags` per categorical column."""

    labels: NDArray[np.uint8]
    dense: NDArray[np.float32]
    bags: tuple[Bags, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the shard."""
        return len(self.labels)


def write_shard(columns: Columns, schema: Schema, folder: str, file: str) -> ShardInfo:
    """Write `columns` to `folder`/`file` (through a temporary name) and return its entry for the manifest."""
    batch = _to_record_batch(columns, schema)
    path = join(folder, file)
    path_manager.mkdirs(os.path.dirname(path))
    with path_manager.open(path + ".tmp", "wb") as sink:
        counting = _ChecksummingSink(sink)
        with pa.ipc.new_file(pa.PythonFile(counting, mode="w"), batch.schema) as writer:
            writer.write_batch(batch)
    replace(path + ".tmp", path)
    return ShardInfo(file=file, num_rows=columns.num_rows, num_bytes=counting.num_bytes, crc32=counting.crc32)


def open_shard(info: ShardInfo, schema: Schema, folder: str, *, verify_checksum: bool = True) -> Columns:
    """Memory-map a shard; the arrays are views of the file and are paged in when read.

    Raises:
        DatasetError: the file is missing, has another size or checksum than the manifest says, or other columns.
    """
    path = join(folder, info.file)
    if not path_manager.exists(path):
        raise DatasetError(f"shard {path} is missing; restore it or preprocess the data again")
    problem = link_problem(folder, info.file)
    if problem is not None:
        raise DatasetError(f"shard {problem}")
    local_path = path_manager.get_local_path(path)
    num_bytes = os.path.getsize(local_path)
    if num_bytes != info.num_bytes:
        raise DatasetError(
            f"shard {path} has {num_bytes} bytes, the manifest says {info.num_bytes}: it was changed or cut off after "
            "it was written; restore it or preprocess the data again"
        )
    if verify_checksum and file_crc32(local_path) != info.crc32:
        raise DatasetError(
            f"shard {path} was changed after it was written (checksum differs from the manifest's); restore it or "
            "preprocess the data again"
        )
    try:
        with pa.memory_map(local_path) as source:
            table = pa.ipc.open_file(source).read_all()
        _check_types(table, schema)
        return _from_table(table, schema)
    except pa.ArrowException as error:
        raise DatasetError(f"shard {path} does not hold the columns of the manifest ({error})") from None


def file_crc32(local_path: str) -> int:
    """CRC-32 (zlib's) of a whole local file."""
    crc32 = 0
    with open(local_path, "rb") as file:
        while chunk := file.read(CHECKSUM_CHUNK_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32


class _ChecksummingSink:
    """A writable file object that counts and checksums what passes through."""

    def __init__(self, sink: object) -> None:
        self._sink = sink
        self.crc32 = 0
        self.num_bytes = 0
        self.closed = False

    def write(self, data: bytes) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        self.num_bytes += len(data)
        return self._sink.write(data)  # type: ignore[attr-defined,no-any-return]

    def flush(self) -> None:
        self._sink.flush()  # type: ignore[attr-defined]

    def close(self) -> None:
        self.closed = True


def _to_record_batch(columns: Columns, schema: Schema) -> pa.RecordBatch:
    arrays: dict[str, pa.Array] = {LABEL: pa.array(columns.labels, pa.uint8())}
    if schema.dense:
        flat = pa.array(np.ascontiguousarray(columns.dense).reshape(-1), pa.float32())
        arrays[DENSE] = pa.FixedSizeListArray.from_arrays(flat, len(schema.dense))
    for column, bags in zip(schema.categorical, columns.bags, strict=True):
        ids = pa.array(bags.ids, pa.int32())
        arrays[f"id:{column.name}"] = ids if bags.offsets is None else pa.ListArray.from_arrays(bags.offsets, ids)
    return pa.RecordBatch.from_pydict(arrays)


def _check_types(table: pa.Table, schema: Schema) -> None:
    wanted = {LABEL: pa.uint8()}
    if schema.dense:
        wanted[DENSE] = pa.list_(pa.float32(), len(schema.dense))
    for column in schema.categorical:
        wanted[f"id:{column.name}"] = pa.list_(pa.int32()) if column.multi_hot else pa.int32()
    found = dict(zip(table.schema.names, table.schema.types, strict=True))
    for name, arrow_type in wanted.items():
        if found.get(name) != arrow_type:
            raise pa.ArrowInvalid(f"column {name} is {found.get(name, 'missing')}, not {arrow_type}")


def _from_table(table: pa.Table, schema: Schema) -> Columns:
    def column(name: str) -> pa.Array:
        chunked = table.column(name)
        return chunked.chunk(0) if chunked.num_chunks else chunked.combine_chunks()

    labels = column(LABEL).to_numpy()
    num_dense = len(schema.dense)
    dense = column(DENSE).flatten().to_numpy() if num_dense else np.empty(0, np.float32)
    bags = []
    for categorical in schema.categorical:
        array = column(f"id:{categorical.name}")
        if categorical.multi_hot:
            bags.append(Bags(array.values.to_numpy(), array.offsets.to_numpy()))
        else:
            bags.append(Bags(array.to_numpy()))
    return Columns(labels, dense.reshape(-1, num_dense) if num_dense else dense.reshape(len(labels), 0), tuple(bags))
