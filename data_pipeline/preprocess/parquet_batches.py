"""A Parquet file as batches that are bounded in bytes: rows of long bags come few at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

# Decoded. About 1 million 64-bit ids, for which a worker takes ten times as much while it encodes them.
BATCH_BYTES = 8 << 20
BATCH_ROWS = 1 << 15
# Rows decoded at once at most, where a row group's average says nothing of its longest bags.
_DECODED_ROWS = 1 << 8
_BYTES_PER_VALUE = 8


def read_batches(parquet: pyarrow.parquet.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield batches of at most BATCH_ROWS rows and BATCH_BYTES bytes, or of one row. The file alone says where."""
    held: list[pa.RecordBatch] = []
    num_rows = num_bytes = 0
    for batch in _decoded(parquet, columns):
        for piece in _cut(batch):
            piece_bytes = batch_bytes(piece)
            if held and (num_rows + piece.num_rows > BATCH_ROWS or num_bytes + piece_bytes > BATCH_BYTES):
                yield _joined(held)
                held, num_rows, num_bytes = [], 0, 0
            held.append(piece)
            num_rows, num_bytes = num_rows + piece.num_rows, num_bytes + piece_bytes
    if held:
        yield _joined(held)


def _decoded(parquet: pyarrow.parquet.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    for group in range(parquet.num_row_groups):
        rows = rows_at_once(parquet.metadata.row_group(group))
        yield from parquet.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)


def rows_at_once(group: pyarrow.parquet.RowGroupMetaData) -> int:
    """How many rows of a row group are decoded at once, by its average number of values and of bytes in a row."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    num_bytes = sum(
        max(int(chunk.num_values) * _BYTES_PER_VALUE, int(chunk.total_uncompressed_size)) for chunk in chunks
    )
    return max(1, min(_DECODED_ROWS, BATCH_BYTES * int(group.num_rows) // max(num_bytes, 1)))


def _cut(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Halve a batch until it is small enough."""
    if batch.num_rows <= 1 or batch_bytes(batch) <= BATCH_BYTES:
        if batch.num_rows:
            yield batch
        return
    half = batch.num_rows // 2
    yield from _cut(batch.slice(0, half))
    yield from _cut(batch.slice(half))


def batch_bytes(batch: pa.RecordBatch) -> int:
    """Bytes of a batch's values once dictionaries are decoded."""
    return sum(_num_bytes(column) for column in batch.columns)


def _num_bytes(array: pa.Array) -> int:
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _BYTES_PER_VALUE * len(array) + _num_bytes(array.flatten())
    if not pa.types.is_dictionary(array.type):
        return int(array.nbytes)
    if not _is_text(array.type.value_type):
        return _BYTES_PER_VALUE * len(array)
    lengths = pc.binary_length(array.dictionary).cast(pa.int64())
    return _BYTES_PER_VALUE * len(array) + int(pc.sum(lengths.take(array.indices)).as_py() or 0)


def _is_text(arrow_type: pa.DataType) -> bool:
    """Whether `pc.binary_length` takes it: unlike `arrow_types.is_text`, no views."""
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(arrow_type) for test in tests)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
