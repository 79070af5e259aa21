"""Any CSV, TSV or Parquet table described by a schema, through pyarrow, a batch of rows at a time.

Text files start with a header line; fields may be quoted, but not hold line breaks (lines could not be numbered).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from data_pipeline.bad_rows import BadRow, PreprocessError
from data_pipeline.byte_blocks import PADDING_BYTES, strip_compression
from data_pipeline.parquet_batches import read_batches
from data_pipeline.paths import path_manager
from data_pipeline.raw_chunk import RawChunk
from data_pipeline.schema import CategoricalColumn, Schema
from data_pipeline.table_columns import Faults, categorical_codes, dense_values, labels_of

_PARQUET_BUFFER_BYTES = 1 << 20
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}


def delimiter_of(path: str) -> str | None:
    """Return the delimiter of a text table by its name, None for Parquet.

    Raises:
        PreprocessError: the name ends otherwise.
    """
    suffix = os.path.splitext(strip_compression(path))[1].lower()
    if suffix == ".parquet":
        return None
    if suffix not in _DELIMITERS:
        raise PreprocessError(f"input {path} must end in .csv, .tsv, .txt (tabs), each maybe .gz or .zst, or .parquet")
    return _DELIMITERS[suffix]


def parse_header(line: bytes, path: str, schema: Schema, *, needs_label: bool = True) -> tuple[str, ...]:
    """Split a header line into column names.

    Raises:
        PreprocessError: it is not UTF-8, or lacks a column of the schema.
    """
    try:
        text = line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise PreprocessError(f"{path}, line 1: the header is not UTF-8 text") from None
    names = next(csv.reader([text], delimiter=delimiter_of(path) or ","), [])
    _check_names(names, path, schema, needs_label=needs_label)
    return tuple(names)


def _check_names(names: list[str], path: str, schema: Schema, *, needs_label: bool) -> None:
    wanted = [*[schema.label] * needs_label, *schema.dense_names, *schema.categorical_names]
    lacking = [name for name in wanted if name not in names]
    if lacking:
        raise PreprocessError(
            f"{path} has no column {', '.join(lacking)}; it has {', '.join(names[:40])}. Correct the schema, or the "
            "header in the file's first line"
        )
    repeated = sorted({name for name in wanted if names.count(name) > 1})
    if repeated:
        raise PreprocessError(f"{path} has several columns named {', '.join(repeated)}; names must differ")


def read_parquet_batches(path: str, schema: Schema, *, needs_label: bool = True) -> Iterator[tuple[int, bytes]]:
    """Yield (first row, Arrow IPC stream) of batches with the schema's columns.

    Raises:
        PreprocessError: the file is damaged or truncated, or lacks a column.
    """
    wanted = [schema.label, *schema.dense_names, *schema.categorical_names]
    try:
        with path_manager.open(path, "rb") as file:
            # Buffered: else the whole of a row group's columns is read at once.
            parquet = pyarrow.parquet.ParquetFile(file, buffer_size=_PARQUET_BUFFER_BYTES)
            _check_names(parquet.schema_arrow.names, path, schema, needs_label=needs_label)
            wanted = [name for name in wanted if name in parquet.schema_arrow.names]
            first_row = 0
            for batch in read_batches(parquet, wanted):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, batch.schema) as writer:
                    writer.write_batch(batch)
                yield first_row, sink.getvalue().to_pybytes()
                first_row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise PreprocessError(f"input {path} is damaged or truncated ({error}); fetch it again") from None


def parse_parquet_batch(data: bytes, schema: Schema) -> RawChunk:
    """Parse one batch of `read_parquet_batches`; lines of malformed rows are row numbers from 1."""
    table = pa.ipc.open_stream(data).read_all().combine_chunks()
    arrays = {name: table.column(name).combine_chunks() for name in table.column_names}

    def row_bytes(row: int) -> bytes:
        return repr({name: array[row - 1].as_py() for name, array in arrays.items()}).encode()

    return _convert(_Rows(arrays, np.arange(1, table.num_rows + 1), table.num_rows, row_bytes, []), schema)


def parse_text_block(
    buffer: NDArray[np.uint8], header: tuple[str, ...], delimiter: str, schema: Schema, *, starts_file: bool
) -> RawChunk:
    """Parse whole lines of delimited text (as `byte_blocks.load_block` returns them).

    Raises:
        PreprocessError: a quoted field holds a line break.
    """
    lines = _Lines(buffer[PADDING_BYTES:], 1 if starts_file else 0)
    table, bad_rows = _read_text(lines, header, delimiter)
    is_row = np.ones(lines.count, np.bool_)
    is_row[: lines.num_header_lines] = False
    is_row[[row.line - 1 for row in bad_rows]] = False
    line_numbers = np.flatnonzero(is_row) + 1
    if table.num_rows != len(line_numbers):
        raise PreprocessError("a quoted field holds a line break, which is not supported; write the table as Parquet")
    wanted = {schema.label, *schema.dense_names, *schema.categorical_names}
    arrays = {name: table.column(name).combine_chunks() for name in header if name in wanted}
    return _convert(_Rows(arrays, line_numbers, lines.count, lines.read, bad_rows), schema)


class _Lines:
    """The lines of a block, numbered from 1."""

    def __init__(self, text: NDArray[np.uint8], num_header_lines: int) -> None:
        self._text = text
        self._ends = np.flatnonzero(text == ord("\n")) + 1
        self.count = len(self._ends)
        self.num_header_lines = num_header_lines
        self.body = text[self._ends[0] :] if num_header_lines else text

    def read(self, line: int) -> bytes:
        start = int(self._ends[line - 2]) if line > 1 else 0
        return self._text[start : int(self._ends[line - 1])].tobytes()


def _read_text(lines: _Lines, header: tuple[str, ...], delimiter: str) -> tuple[pa.Table, list[BadRow]]:
    bad_rows: list[BadRow] = []

    def set_aside(row: Any) -> str:
        line = int(row.number) + lines.num_header_lines
        reason = f"{row.actual_columns} fields, the header has {row.expected_columns}"
        bad_rows.append(BadRow(line, "(row)", reason, lines.read(line)))
        return "skip"

    types = {name: pa.binary() for name in header}
    if not lines.body.size:
        return pa.table({name: pa.array([], pa.binary()) for name in header}), bad_rows
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(pa.py_buffer(lines.body)),
            # One Arrow block and one thread: else rows are not numbered.
            pyarrow.csv.ReadOptions(use_threads=False, block_size=lines.body.size + 1, column_names=list(header)),
            pyarrow.csv.ParseOptions(delimiter=delimiter, ignore_empty_lines=False, invalid_row_handler=set_aside),
            pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False, check_utf8=False),
        )
    except pa.ArrowInvalid as error:
        raise PreprocessError(f"not a table of delimited text ({error}); look for a quote that is not closed") from None
    return table, bad_rows


@dataclass(frozen=True)
class _Rows:
    """Raw columns, the line of each row, how many lines there were, how to read one, and those set aside so far."""

    arrays: dict[str, pa.Array]
    line_numbers: NDArray[np.int64]
    num_lines: int
    read_line: Callable[[int], bytes]
    bad_rows: list[BadRow]

    def without(self, faults: Faults) -> _Rows:
        is_kept = np.ones(len(self.line_numbers), np.bool_)
        is_kept[list(faults.first_of_row)] = False
        bad_rows = list(self.bad_rows)
        for row, (name, reason) in faults.first_of_row.items():
            line = int(self.line_numbers[row])
            bad_rows.append(BadRow(line, name, reason, self.read_line(line)))
        arrays = {name: pc.filter(array, pa.array(is_kept)) for name, array in self.arrays.items()}
        return replace(self, arrays=arrays, line_numbers=self.line_numbers[is_kept], bad_rows=bad_rows)


def _convert(rows: _Rows, schema: Schema) -> RawChunk:
    """Turn raw columns into a chunk; rows with a fault are set aside and the rest is converted again."""
    faults = Faults()
    labels = np.zeros(len(rows.line_numbers), np.uint8)
    if schema.label in rows.arrays:  # rows to be scored need none
        labels = labels_of(rows.arrays[schema.label], schema.label, faults)
    dense = np.empty((len(labels), len(schema.dense)), np.float32)
    num_missing, num_clipped = np.zeros((2, len(schema.dense)), np.int64)
    for i, column in enumerate(schema.dense):
        dense[:, i], num_missing[i], num_clipped[i] = dense_values(rows.arrays[column.name], column, faults)
    columns = [
        categorical_codes(rows.arrays[c.name], _checked(c, rows.arrays[c.name]), faults) for c in schema.categorical
    ]
    if faults.first_of_row:
        return _convert(rows.without(faults), schema)
    bad_rows = tuple(sorted(rows.bad_rows, key=lambda row: row.line))
    return RawChunk(rows.num_lines, labels, dense, num_missing, tuple(columns), bad_rows, num_clipped)


def _checked(column: CategoricalColumn, array: pa.Array) -> CategoricalColumn:
    is_list = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
    if is_list and not column.multi_hot:
        raise PreprocessError(f"column {column.name} holds lists; set multi_hot = true for it in the schema")
    return column
