"""Any CSV, TSV or Parquet table described by a schema, through pyarrow, a batch of rows at a time.

Text files start with a header line; fields may be quoted, but not hold line breaks (lines could not be numbered). A
blank line is no row, except in a table of one column, where it is a row without a value.
"""

from __future__ import annotations

import csv
import os
import textwrap
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from papilio.data_pipeline.arrow_types import plain_column, type_fault
from papilio.data_pipeline.paths import path_manager
from papilio.data_pipeline.preprocess.bad_rows import BadRow, PreprocessError
from papilio.data_pipeline.preprocess.byte_blocks import PADDING_BYTES, RETURNS_HINT, strip_compression
from papilio.data_pipeline.preprocess.parquet_batches import read_batches
from papilio.data_pipeline.preprocess.raw_chunk import RawChunk
from papilio.data_pipeline.preprocess.table_columns import categorical_codes, dense_values, labels_of
from papilio.data_pipeline.raw_values import Faults
from papilio.data_pipeline.schema import Schema

_PARQUET_BUFFER_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
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
    if "\r" in text:
        raise PreprocessError(f"{path}, line 1: the header holds a carriage return: {RETURNS_HINT}")
    if text.count('"') % 2:
        raise PreprocessError(f"{path}, line 1: the header holds a quote that is not closed on the same line")
    try:
        names = next(csv.reader([text], delimiter=delimiter_of(path) or ","), [])
    except csv.Error as error:
        raise PreprocessError(f"{path}, line 1: the header is no line of column names ({error})") from None
    _check_names(names, path, schema, needs_label=needs_label)
    return tuple(names)


def _check_names(names: list[str], path: str, schema: Schema, *, needs_label: bool) -> None:
    wanted = [*[schema.label] * needs_label, *schema.dense_names, *schema.categorical_names]
    lacking = [name for name in wanted if name not in names]
    if lacking:
        found = textwrap.shorten(", ".join(names[:40]), 400)
        raise PreprocessError(
            f"{path} has no column {', '.join(lacking)}; it has {found}. Correct the schema, or the "
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
            _check_types(parquet.schema_arrow, path, schema)
            first_row = 0
            for batch in read_batches(parquet, wanted):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, batch.schema) as writer:
                    writer.write_batch(batch)
                yield first_row, sink.getvalue().to_pybytes()
                first_row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise PreprocessError(f"input {path} is damaged or truncated ({error}); fetch it again") from None


def _check_types(found: pa.Schema, path: str, schema: Schema) -> None:
    for name, role in schema.roles().items():
        fault = type_fault(found.field(name).type, name, role) if name in found.names else None
        if fault is not None:
            raise PreprocessError(f"{path}: {fault}")


def parse_parquet_batch(data: bytes, schema: Schema) -> RawChunk:
    """Parse one batch of `read_parquet_batches`; lines of malformed rows are row numbers from 1."""
    table = pa.ipc.open_stream(data).read_all()
    wanted = schema.roles()  # pyarrow reads the field b of a struct a, too, where "a.b" is asked for
    arrays = {name: plain_column(table.column(name)) for name in table.column_names if name in wanted}

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
    lines = _Lines(buffer[PADDING_BYTES:], 1 if starts_file else 0, keeps_blank=len(header) == 1)
    table, bad_rows = _read_text(lines, header, delimiter)
    line_numbers = lines.numbers
    if bad_rows:
        line_numbers = line_numbers[~np.isin(line_numbers, [row.line for row in bad_rows])]
    if table.num_rows != len(line_numbers) or lines.holds_both_faults():
        raise PreprocessError(lines.count_fault())
    wanted = schema.roles()
    arrays = {name: plain_column(table.column(name)) for name in header if name in wanted}
    return _convert(_Rows(arrays, line_numbers, lines.count, lines.read, bad_rows), schema)


class _Lines:
    """The lines of a block, numbered from 1: `body` is the text of those that may be rows, `numbers` are theirs."""

    def __init__(self, text: NDArray[np.uint8], num_header_lines: int, *, keeps_blank: bool) -> None:
        self._text = text
        self._ends = np.flatnonzero(text == ord("\n")) + 1
        self.count = len(self._ends)
        lengths = np.diff(self._ends, prepend=0)
        is_row = np.ones(self.count, np.bool_)
        is_row[:num_header_lines] = False
        if not keeps_blank and lengths.min(initial=3) <= 2:
            has_return = text[np.maximum(self._ends - 2, 0)] == ord("\r")
            is_row &= (lengths > 2) | ((lengths == 2) & ~has_return)
        self.numbers = np.flatnonzero(is_row) + 1
        if is_row[num_header_lines:].all():
            self.body = text[self._ends[0] :] if num_header_lines else text
        else:
            self.body = text[np.repeat(is_row, lengths)]

    def is_unicode(self) -> bool:
        """Whether the rows are UTF-8."""
        ends = pa.py_buffer(np.array([0, self.body.size], np.int64))
        text = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(self.body)])
        try:
            text.cast(pa.large_string())
        except pa.ArrowInvalid:
            return False
        return True

    def body_without(self, rows: Collection[int]) -> NDArray[np.uint8]:
        """The text of all rows but some (rows that are in no line count for nothing)."""
        is_kept = np.ones(len(self.numbers), np.bool_)
        is_kept[[row for row in rows if row < len(is_kept)]] = False
        lengths = np.diff(self._ends, prepend=0)[self.numbers - 1]
        return self.body[np.repeat(is_kept, lengths)]

    def holds_both_faults(self) -> bool:
        """Whether some quoted line break may be made up for by a stray carriage return: a row less, a row more."""
        text = self._text.tobytes()
        if b'"' not in text or text.count(b"\r") == text.count(b"\r\n"):
            return False
        quotes = np.add.reduceat(self._text == ord('"'), np.concatenate([[0], self._ends[:-1]]), dtype=np.int64)
        return bool((quotes % 2).any())

    def _stray_returns(self) -> NDArray[np.int64]:
        is_stray = self._text == ord("\r")
        is_stray[:-1] &= self._text[1:] != ord("\n")
        return np.flatnonzero(is_stray)

    def count_fault(self) -> str:
        """Say why there are more or fewer rows than lines."""
        stray = self._stray_returns()
        if len(stray):
            line = int(np.searchsorted(self._ends, stray[0], side="right")) + 1
            return f"line {line} from there holds a carriage return: {RETURNS_HINT}"
        return "a quoted field holds a line break, which is not supported; write the table as Parquet"

    def read(self, line: int) -> bytes:
        start = int(self._ends[line - 2]) if line > 1 else 0
        return self._text[start : int(self._ends[line - 1])].tobytes()


def _read_text(lines: _Lines, header: tuple[str, ...], delimiter: str) -> tuple[pa.Table, list[BadRow]]:
    reasons: dict[int, str] = {}

    def set_aside(row: Any) -> str:
        reasons[row.number - 1] = f"{row.actual_columns} fields, the header has {row.expected_columns}"
        return "skip"

    def parsed(body: NDArray[np.uint8]) -> pa.Table:
        if not body.size:
            return pa.table({name: pa.array([], pa.binary()) for name in header})
        if body[: len(_BYTE_ORDER_MARK)].tobytes() == _BYTE_ORDER_MARK:
            # Arrow takes one off, but this one is not the file's: it is part of a field.
            body = np.concatenate([body[: len(_BYTE_ORDER_MARK)], body])
        return pyarrow.csv.read_csv(
            pa.BufferReader(pa.py_buffer(body)),
            # One Arrow block and one thread: else rows are not numbered.
            pyarrow.csv.ReadOptions(use_threads=False, block_size=body.size + 1, column_names=list(header)),
            pyarrow.csv.ParseOptions(delimiter=delimiter, ignore_empty_lines=False, invalid_row_handler=set_aside),
            pyarrow.csv.ConvertOptions(
                column_types={name: pa.binary() for name in header}, strings_can_be_null=False, check_utf8=False
            ),
        )

    try:
        if lines.is_unicode():
            table = parsed(lines.body)
        else:
            # pyarrow cannot hand over a row that is not UTF-8, so rows of too many or few fields are found without.
            first = parsed(np.where(lines.body < 128, lines.body, np.uint8(ord("?"))))
            if first.num_rows + len(reasons) != len(lines.numbers):
                raise PreprocessError(lines.count_fault())
            table = parsed(lines.body_without(reasons))
    except pa.ArrowInvalid as error:
        raise PreprocessError(f"not a table of delimited text ({error}); look for a quote that is not closed") from None
    bad_rows = []
    for row, reason in reasons.items():
        if row >= len(lines.numbers):
            raise PreprocessError(lines.count_fault())
        line = int(lines.numbers[row])
        bad_rows.append(BadRow(line, "(row)", reason, lines.read(line)))
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
    columns = [categorical_codes(rows.arrays[column.name], column, faults) for column in schema.categorical]
    if faults.first_of_row:
        return _convert(rows.without(faults), schema)
    bad_rows = tuple(sorted(rows.bad_rows, key=lambda row: row.line))
    return RawChunk(
        rows.num_lines, rows.line_numbers, labels, dense, num_missing, tuple(columns), bad_rows, num_clipped
    )
