"""Criteo click logs (Kaggle train.txt, Terabyte day_N): label, 13 integers, 26 hexadecimal ids, split by tabs.

A block of text is decoded a column at a time, without per-row Python: the last 8 bytes of each field are read as one
64-bit word, and arithmetic on the word treats its 8 characters at once. Shape letters: N rows, I dense inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.bad_rows import BadRow
from data_pipeline.byte_blocks import PADDING_BYTES
from data_pipeline.raw_chunk import RawChunk, encode_numbers
from data_pipeline.schema import DenseColumn, Schema
from data_pipeline.transforms import transform_dense

NUM_FIELDS = 40
NUM_DENSE = 13
_FIRST_CATEGORICAL = 1 + NUM_DENSE
_TAB, _NEWLINE, _RETURN, _MINUS, _ZERO = (np.uint8(ord(c)) for c in "\t\n\r-0")
_SCAN_BYTES = 1 << 18  # a slice and its temporaries stay in the L2 cache
_WORD_BYTES = 8
_MAX_INTEGER = 2**63 - 1


def _repeat(octet: int) -> np.uint64:
    return np.uint64(octet * 0x0101010101010101)


@dataclass(frozen=True)
class _Fields:
    """Where the fields are: `starts`, `ends` [40, N] byte positions; `words` [position] the 8 bytes from there on."""

    buffer: NDArray[np.uint8]
    words: NDArray[np.uint64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def last_words(self, field: int) -> NDArray[np.uint64]:
        words: NDArray[np.uint64] = self.words[self.ends[field] - _WORD_BYTES]
        return words

    def lengths(self, field: int) -> NDArray[np.int64]:
        lengths: NDArray[np.int64] = self.ends[field] - self.starts[field]
        return lengths


def parse_criteo(buffer: NDArray[np.uint8], schema: Schema) -> RawChunk:
    """Parse whole lines of Criteo text (as `byte_blocks.load_block` returns them). Malformed rows are set aside."""
    line_numbers: NDArray[np.int64] | None = None
    bad_rows: list[BadRow] = []
    while True:
        chunk, is_bad = _parse_clean(buffer, schema)
        if chunk is not None:
            num_lines = chunk.num_lines + len(bad_rows)
            bad_rows.sort(key=lambda row: row.line)
            return RawChunk(num_lines, chunk.labels, chunk.dense, chunk.num_missing, chunk.columns, tuple(bad_rows))
        if line_numbers is None:
            line_numbers = np.arange(1, len(is_bad) + 1)
        buffer, raw_rows = _drop_lines(buffer, is_bad)
        for line, raw in zip(line_numbers[is_bad].tolist(), raw_rows, strict=True):
            bad_rows.append(BadRow(line, *diagnose(raw, schema), raw))
        line_numbers = line_numbers[~is_bad]


def diagnose(raw: bytes, schema: Schema) -> tuple[str, str]:
    """Name the first field of a malformed row that is wrong, and what is wrong with it."""
    fields = raw.removesuffix(b"\n").removesuffix(b"\r").split(b"\t")
    if len(fields) != NUM_FIELDS:
        return "(row)", f"{len(fields)} fields, a Criteo row has {NUM_FIELDS} split by tabs; row starts {raw[:40]!r}"
    names = [schema.label, *schema.dense_names, *schema.categorical_names]
    for number, (name, field) in enumerate(zip(names, fields, strict=True)):
        if fault := _fault(number, field):
            return name, fault
    raise AssertionError(f"row was refused but has no fault: {raw!r}")


def _fault(number: int, field: bytes) -> str | None:
    try:
        field.decode()
    except UnicodeDecodeError:
        return f"{field!r} is not UTF-8 text"
    if number == 0:
        return None if field in (b"0", b"1") else f"label is {field.decode()!r}, must be 0 or 1"
    if number < _FIRST_CATEGORICAL:
        is_number = re.fullmatch(rb"-?[0-9]+|", field) and abs(int(field or b"0")) <= _MAX_INTEGER
        return None if is_number else f"{field.decode()!r} is not a whole number of at most 64 bits"
    is_hex = re.fullmatch(rb"[0-9a-fA-F]{0,8}", field)
    return None if is_hex else f"{field.decode()!r} is not an id of at most 8 hexadecimal digits"


def _parse_clean(buffer: NDArray[np.uint8], schema: Schema) -> tuple[RawChunk | None, NDArray[np.bool_]]:
    """Return the chunk, or None and which lines are malformed."""
    separators, others = _scan(buffer)
    is_newline = buffer[separators] == _NEWLINE
    num_rows = int(np.count_nonzero(is_newline))
    if len(separators) != NUM_FIELDS * num_rows or not is_newline[NUM_FIELDS - 1 :: NUM_FIELDS].all():
        return None, np.diff(np.flatnonzero(is_newline), prepend=-1) != NUM_FIELDS
    fields = _locate(buffer, separators, num_rows)
    is_bad = np.zeros(num_rows, np.bool_)
    is_bad[_rows_of_stray_bytes(buffer, separators, others)] = True
    labels = buffer[fields.starts[0]] - _ZERO
    is_bad |= (fields.lengths(0) != 1) | (labels > 1)
    dense = np.empty((num_rows, NUM_DENSE), np.float32)
    num_missing = np.zeros(NUM_DENSE, np.int64)
    for i, column in enumerate(schema.dense):
        dense[:, i], num_missing[i] = _dense_column(fields, 1 + i, column, is_bad)
    hex_lengths = fields.ends[_FIRST_CATEGORICAL:] - fields.starts[_FIRST_CATEGORICAL:]
    is_bad |= (hex_lengths > _WORD_BYTES).any(axis=0)
    if is_bad.any():
        return None, is_bad
    columns = []
    for c, categorical in enumerate(schema.categorical):
        values = decode_hex(fields.last_words(_FIRST_CATEGORICAL + c), hex_lengths[c])
        missing = hex_lengths[c] == 0
        columns.append(encode_numbers(values, missing if missing.any() else None, categorical))
    return RawChunk(num_rows, labels, dense, num_missing, tuple(columns), ()), is_bad


def _scan(buffer: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of separators, and of bytes that are neither separators nor hexadecimal digits."""
    separators, others = [], []
    for start in range(PADDING_BYTES, len(buffer), _SCAN_BYTES):
        piece = buffer[start : start + _SCAN_BYTES]
        is_separator = piece == _TAB
        is_separator |= piece == _NEWLINE
        is_known = (piece - _ZERO) < 10
        is_known |= ((piece | np.uint8(0x20)) - np.uint8(ord("a"))) < 6
        is_known |= is_separator
        separators.append(np.flatnonzero(is_separator) + start)
        others.append(np.flatnonzero(~is_known) + start)
    return np.concatenate(separators), np.concatenate(others)


def _locate(buffer: NDArray[np.uint8], separators: NDArray[np.int64], num_rows: int) -> _Fields:
    ends = np.ascontiguousarray(separators.reshape(num_rows, NUM_FIELDS).T)
    starts = np.empty_like(ends)
    starts[1:] = ends[:-1] + 1
    starts[0, :1] = PADDING_BYTES
    starts[0, 1:] = ends[-1, :-1] + 1
    ends[-1] -= buffer[ends[-1] - 1] == _RETURN
    words: NDArray[Any] = np.ndarray((len(buffer) - _WORD_BYTES + 1,), np.uint64, buffer, strides=(1,))
    return _Fields(buffer, words, starts, ends)


def _rows_of_stray_bytes(
    buffer: NDArray[np.uint8], separators: NDArray[np.int64], others: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Rows with a byte that is no hexadecimal digit within an id; integers are checked where they are decoded."""
    field_ends = np.searchsorted(separators, others)
    row, field = np.divmod(field_ends, NUM_FIELDS)
    is_line_end = (buffer[others] == _RETURN) & (others + 1 == separators[field_ends]) & (field == NUM_FIELDS - 1)
    stray: NDArray[np.int64] = row[(field >= _FIRST_CATEGORICAL) & ~is_line_end]
    return stray


def decode_hex(words: NDArray[np.uint64], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Read the last `lengths` (0..8) characters of each word, which must be hexadecimal digits, as a number."""
    is_letter = (words >> np.uint64(6)) & _repeat(0x01)
    nibbles = (words & _repeat(0x0F)) + is_letter * np.uint64(9)
    if lengths.min(initial=_WORD_BYTES) < _WORD_BYTES:
        nibbles = _keep_last(nibbles, lengths)
    # Neighbours join: 8 digits in 8 bytes, 4 pairs in 4 x 2, 2 fours in 2 x 4. The first character is the lowest byte.
    pairs = ((nibbles << np.uint64(4)) | (nibbles >> np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
    fours = ((pairs << np.uint64(8)) | (pairs >> np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
    return ((fours << np.uint64(16)) | (fours >> np.uint64(32))) & np.uint64(0xFFFFFFFF)


def decode_decimal(digits: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Read words whose 8 bytes are decimal digits 0..9, the first the lowest byte, as numbers."""
    pairs = (digits * np.uint64(10) + (digits >> np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
    fours = (pairs * np.uint64(100) + (pairs >> np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
    number: NDArray[Any] = (fours * np.uint64(10_000) + (fours >> np.uint64(32))) & np.uint64(0xFFFFFFFF)
    return number.view(np.int64)


def _keep_last(words: NDArray[np.uint64], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Clear all but the last `lengths` bytes; of an empty field one byte is kept, which nobody may use."""
    shift = (8 * (_WORD_BYTES - np.clip(lengths, 1, _WORD_BYTES))).astype(np.uint64)
    return (words >> shift) << shift


def _dense_column(
    fields: _Fields, field: int, column: DenseColumn, is_bad: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], int]:
    """Decode and transform one integer column; marks malformed rows in `is_bad`."""
    is_negative = fields.buffer[fields.starts[field]] == _MINUS
    lengths = fields.lengths(field)
    num_digits = lengths - is_negative
    digits = _keep_last(fields.last_words(field) ^ _repeat(ord("0")), num_digits)
    values = decode_decimal(digits).astype(np.float64)
    missing = lengths == 0
    # A byte above 9 carries into its high half when 6 is added; one above 15 has it set already.
    is_wrong = ((digits + _repeat(6)) | digits) & _repeat(0xF0) != 0
    is_wrong |= num_digits == 0
    is_wrong &= ~missing
    values[is_negative] *= -1
    for row in np.flatnonzero(num_digits > _WORD_BYTES):
        text = fields.buffer[fields.starts[field, row] : fields.ends[field, row]].tobytes()
        is_wrong[row] = _fault(field, text) is not None
        values[row] = 0.0 if is_wrong[row] else float(int(text))
    is_bad |= is_wrong
    return transform_dense(values, missing, column), int(np.count_nonzero(missing))


def _drop_lines(buffer: NDArray[np.uint8], is_dropped: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], list[bytes]]:
    """Return the buffer without the dropped lines, and these."""
    ends = np.flatnonzero(buffer[PADDING_BYTES:] == _NEWLINE) + PADDING_BYTES + 1
    starts = np.concatenate([[PADDING_BYTES], ends[:-1]])
    rows = [buffer[s:e].tobytes() for s, e in zip(starts[is_dropped], ends[is_dropped], strict=True)]
    is_kept = np.repeat(~is_dropped, ends - starts)
    return np.concatenate([buffer[:PADDING_BYTES], buffer[PADDING_BYTES:][is_kept]]), rows
