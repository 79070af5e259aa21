"""Criteo click logs (Kaggle train.txt, Terabyte day_N): label, 13 integers, 26 hexadecimal ids, split by tabs.

Text is decoded a slice at a time, without per-row Python: the last 8 bytes of each field are read as one 64-bit word;
arithmetic on the words treats 8 characters at once. Shape letters: N rows, I dense inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from papilio.data_pipeline.preprocess.bad_rows import BadRow
from papilio.data_pipeline.preprocess.byte_blocks import PADDING_BYTES, RETURNS_HINT
from papilio.data_pipeline.preprocess.raw_chunk import RawChunk, encode_numbers
from papilio.data_pipeline.raw_values import shown
from papilio.data_pipeline.schema import Schema
from papilio.data_pipeline.transforms import count_clipped, transform_dense

NUM_FIELDS = 40
NUM_DENSE = 13
_FIRST_CATEGORICAL = 1 + NUM_DENSE
_TAB, _NEWLINE, _RETURN, _MINUS, _ZERO = (np.uint8(ord(c)) for c in "\t\n\r-0")
_SLICE_BYTES = 1 << 18  # about 1,000 rows: a slice and its temporaries stay in the L2 cache
_WORD_BYTES = 8
_MAX_INTEGER = 2**63 - 1
_MAX_DIGITS = 19


def _repeat(octet: int) -> np.uint64:
    return np.uint64(octet * 0x0101010101010101)


# [length] masks of the last `length` bytes of a word (its highest ones).
_LAST_BYTES = np.array([(2**64 - 1) ^ (2 ** (8 * (_WORD_BYTES - length)) - 1) for length in range(9)], np.uint64)


def _joins(base: int) -> list[tuple[np.uint64, np.uint64, np.uint64]]:
    """Multiplier, right shift and mask that join neighbours of 1, 2 and 4 digits, held in 8, 16 and 32 bits each."""
    kept = (0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF, 0x00000000FFFFFFFF)
    return [
        (np.uint64(1 + (base**digits << 8 * digits)), np.uint64(8 * digits), np.uint64(mask))
        for digits, mask in zip((1, 2, 4), kept, strict=True)
    ]


_HEX_JOINS, _DECIMAL_JOINS = _joins(16), _joins(10)


@dataclass(frozen=True)
class _Rows:
    """Decoded rows; `lines` [N] count from 0, `ids` [26, N] are below 2**32, of no meaning where `no_id` [26, N]."""

    lines: NDArray[np.int64]
    labels: NDArray[np.uint8]
    dense: NDArray[np.float32]
    no_dense: NDArray[np.bool_]
    ids: NDArray[np.uint64]
    no_id: NDArray[np.bool_]
    num_clipped: NDArray[np.int64]


def parse_criteo(buffer: NDArray[np.uint8], schema: Schema) -> RawChunk:
    """Parse whole lines of Criteo text (as `byte_blocks.load_block` returns them). Malformed rows are set aside."""
    bad_rows: list[BadRow] = []
    parts: list[_Rows] = []
    num_lines = 0
    for slice_buffer in _slices(buffer):
        rows, slice_bad_rows = _parse_slice(slice_buffer, schema)
        parts.append(replace(rows, lines=num_lines + rows.lines))
        bad_rows += [replace(row, line=num_lines + row.line) for row in slice_bad_rows]
        num_lines += int(np.count_nonzero(slice_buffer[PADDING_BYTES:] == _NEWLINE))
    num_missing = sum((part.no_dense.sum(axis=0) for part in parts), np.zeros(NUM_DENSE, np.int64))
    ids = np.concatenate([part.ids for part in parts], axis=1)
    missing = np.concatenate([part.no_id for part in parts], axis=1)
    columns = []
    for c, column in enumerate(schema.categorical):
        columns.append(encode_numbers(ids[c], missing[c] if missing[c].any() else None, column))
    return RawChunk(
        num_lines,
        np.concatenate([part.lines for part in parts]) + 1,
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.dense for part in parts]),
        num_missing,
        tuple(columns),
        tuple(bad_rows),
        sum((part.num_clipped for part in parts), np.zeros(NUM_DENSE, np.int64)),
    )


def _slices(buffer: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Cut at line ends into views of about _SLICE_BYTES, each with padding (other text, never used) in front."""
    start = PADDING_BYTES
    while start < len(buffer):
        stop, last_newline = start, -1
        while last_newline < 0:
            stop = min(stop + _SLICE_BYTES, len(buffer))
            last_newline = buffer[start:stop].tobytes().rfind(b"\n")
        stop = start + last_newline + 1
        yield buffer[start - PADDING_BYTES : stop]
        start = stop


def _parse_slice(buffer: NDArray[np.uint8], schema: Schema) -> tuple[_Rows, list[BadRow]]:
    lines: NDArray[np.int64] | None = None
    bad_rows: list[BadRow] = []
    while True:
        rows, is_bad = _decode(buffer, schema)
        if rows is not None:
            rows = rows if lines is None else replace(rows, lines=lines)
            return rows, sorted(bad_rows, key=lambda row: row.line)
        if lines is None:
            lines = np.arange(len(is_bad))
        buffer, raw_rows = _drop_lines(buffer, is_bad)
        for line, raw in zip(lines[is_bad].tolist(), raw_rows, strict=True):
            if raw.rstrip(b"\r\n"):  # a blank line is no row
                bad_rows.append(BadRow(line + 1, *diagnose(raw, schema), raw))
        lines = lines[~is_bad]


def diagnose(raw: bytes, schema: Schema) -> tuple[str, str]:
    """Name the first field of a malformed row that is wrong, and what is wrong with it."""
    fields = raw.removesuffix(b"\n").removesuffix(b"\r").split(b"\t")
    if len(fields) != NUM_FIELDS:
        hint = f"; {RETURNS_HINT}" if b"\r" in raw.rstrip(b"\r\n") else ""
        wanted = f"a Criteo row has {NUM_FIELDS} split by tabs"
        return "(row)", f"{len(fields)} fields, {wanted}; row starts {raw[:40]!r}{hint}"
    names = [schema.label, *schema.dense_names, *schema.categorical_names]
    for number, (name, field) in enumerate(zip(names, fields, strict=True)):
        if fault := _fault(number, field):
            return name, fault
    raise AssertionError(f"row was refused but has no fault: {raw!r}")


def _fault(number: int, field: bytes) -> str | None:
    try:
        field.decode()
    except UnicodeDecodeError:
        return f"{field[:40]!r} is not UTF-8 text"
    if number == 0:
        return None if field in (b"0", b"1") else f"label is {shown(field)}, must be 0 or 1"
    if number < _FIRST_CATEGORICAL:
        is_number = not field or _integer_of(field) is not None
        return None if is_number else f"{shown(field)} is not a whole number of at most 64 bits"
    is_hex = re.fullmatch(rb"[0-9a-fA-F]{0,8}", field)
    return None if is_hex else f"{shown(field)} is not an id of at most 8 hexadecimal digits"


def _integer_of(text: bytes) -> int | None:
    digits = text.lstrip(b"-0")  # Python refuses to read thousands of digits
    if re.fullmatch(rb"-?[0-9]+", text) is None or len(digits) > _MAX_DIGITS:
        return None
    number = int(digits or b"0")
    return None if number > _MAX_INTEGER else -number if text.startswith(b"-") else number


def _decode(buffer: NDArray[np.uint8], schema: Schema) -> tuple[_Rows | None, NDArray[np.bool_]]:
    """Return the rows, or None and which lines are malformed."""
    separators, others = _scan(buffer)
    is_newline = buffer[separators] == _NEWLINE
    num_rows = int(np.count_nonzero(is_newline))
    if len(separators) != NUM_FIELDS * num_rows or not is_newline[NUM_FIELDS - 1 :: NUM_FIELDS].all():
        return None, np.diff(np.flatnonzero(is_newline), prepend=-1) != NUM_FIELDS
    ends = separators.reshape(num_rows, NUM_FIELDS)
    lengths = np.diff(separators, prepend=PADDING_BYTES - 1).reshape(num_rows, NUM_FIELDS) - 1
    is_bad = np.zeros(num_rows, np.bool_)
    is_bad[_rows_of_stray_bytes(buffer, separators, others)] = True
    has_return = buffer[ends[:, -1] - 1] == _RETURN
    if has_return.any():
        ends, lengths = ends.copy(), lengths.copy()
        ends[:, -1] -= has_return
        lengths[:, -1] -= has_return
    labels = buffer[ends[:, 0] - 1] - _ZERO
    is_bad |= (lengths[:, 0] != 1) | (labels > 1)
    # Unaligned words: words[p] is the 8 bytes from byte p on.
    words: NDArray[np.uint64] = np.ndarray((len(buffer) - _WORD_BYTES + 1,), np.uint64, buffer, strides=(1,))
    is_dense = slice(1, _FIRST_CATEGORICAL)
    numbers = _decode_integers(buffer, words, ends[:, is_dense], lengths[:, is_dense], is_bad)
    hex_lengths = lengths[:, _FIRST_CATEGORICAL:]
    if hex_lengths.max(initial=0) > _WORD_BYTES:
        is_bad |= (hex_lengths > _WORD_BYTES).any(axis=1)
    if is_bad.any():
        return None, is_bad
    no_dense, no_id = lengths[:, is_dense] == 0, hex_lengths == 0
    # All dense columns of Criteo's schema have the same transform.
    dense = transform_dense(numbers, no_dense, schema.dense[0])
    ids = decode_hex(words[ends[:, _FIRST_CATEGORICAL:] - _WORD_BYTES], hex_lengths)
    # Columns are gathered from here on: turned while they are in the cache.
    num_clipped = count_clipped(numbers, schema.dense[0].transform)
    ids, no_id = np.ascontiguousarray(ids.T), np.ascontiguousarray(no_id.T)
    return _Rows(np.arange(num_rows), labels, dense, no_dense, ids, no_id, num_clipped), is_bad


def _scan(buffer: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of separators, and of bytes that are neither separators nor hexadecimal digits."""
    text = buffer[PADDING_BYTES:]
    is_separator = text == _TAB
    is_separator |= text == _NEWLINE
    is_known = (text - _ZERO) < 10
    is_known |= ((text | np.uint8(0x20)) - np.uint8(ord("a"))) < 6
    is_known |= is_separator
    return np.flatnonzero(is_separator) + PADDING_BYTES, np.flatnonzero(~is_known) + PADDING_BYTES


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
    nibbles = words >> np.uint64(6)
    nibbles &= _repeat(0x01)  # of letters
    nibbles *= np.uint64(9)
    nibbles += words & _repeat(0x0F)
    is_short = lengths < _WORD_BYTES
    if is_short.any():
        nibbles[is_short] &= _LAST_BYTES[lengths[is_short]]
    # Neighbours join: 8 digits in 8 bytes, 4 pairs in 4 x 2, 2 fours in 2 x 4. The first character is the lowest byte:
    # a multiplication adds it, shifted past its neighbour, to the byte above, and a right shift brings both down.
    for join, shift, kept in _HEX_JOINS:
        nibbles *= join
        nibbles >>= shift
        nibbles &= kept
    return nibbles


def decode_decimal(digits: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Read words whose 8 bytes are decimal digits 0..9, the first the lowest byte, as numbers."""
    numbers = digits.copy()
    for join, shift, kept in _DECIMAL_JOINS:
        numbers *= join
        numbers >>= shift
        numbers &= kept
    return numbers.view(np.int64)


def _decode_integers(
    buffer: NDArray[np.uint8],
    words: NDArray[np.uint64],
    ends: NDArray[np.int64],
    lengths: NDArray[np.int64],
    is_bad: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Read whole numbers [N, I], 0 where missing; marks malformed rows in `is_bad`."""
    is_negative = buffer[ends - lengths] == _MINUS
    num_digits = lengths - is_negative
    digits = words[ends - _WORD_BYTES]
    digits ^= _repeat(ord("0"))
    digits &= _LAST_BYTES[np.minimum(num_digits, _WORD_BYTES)]
    numbers = decode_decimal(digits).astype(np.float64)
    # A byte above 9 carries into its high half when 6 is added; one above 15 has it set already.
    carried = digits + _repeat(6)
    carried |= digits
    carried &= _repeat(0xF0)
    is_wrong = carried != 0
    is_wrong |= is_negative & (num_digits == 0)
    np.negative(numbers, out=numbers, where=is_negative)
    for row, i in np.argwhere(num_digits > _WORD_BYTES).tolist():
        text = buffer[ends[row, i] - lengths[row, i] : ends[row, i]].tobytes()
        number = _integer_of(text)
        is_wrong[row, i] = number is None
        numbers[row, i] = 0.0 if number is None else float(number)
    if is_wrong.any():
        is_bad |= is_wrong.any(axis=1)
    return numbers


def _drop_lines(buffer: NDArray[np.uint8], is_dropped: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], list[bytes]]:
    """Return the buffer without the dropped lines, and these."""
    ends = np.flatnonzero(buffer[PADDING_BYTES:] == _NEWLINE) + PADDING_BYTES + 1
    starts = np.concatenate([[PADDING_BYTES], ends[:-1]])
    rows = [buffer[s:e].tobytes() for s, e in zip(starts[is_dropped], ends[is_dropped], strict=True)]
    is_kept = np.repeat(~is_dropped, ends - starts)
    return np.concatenate([buffer[:PADDING_BYTES], buffer[PADDING_BYTES:][is_kept]]), rows
