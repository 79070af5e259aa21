"""The one rule from a raw value to a number or an id, whatever it came in (text, Parquet, JSON, Arrow) and wherever.

- Missing: null, NaN, empty text, and NaN as programs print it (`nan`, `NaN`). In a bag such values are left out.
- An id that is a whole float is the integer, also printed: 3.0, "3.0" and 3 are one id, as are 1e+16's relatives
  "1.2345678901E10" and 12345678901. Files keep an id column as floats as soon as one id is missing.
- A float from 2**53 on (2**24 in 32 bits) may stand for several integers and is no id; nor is any other float. As text
  of kind "string" a fraction is an id like any text; numbers that begin with 0 are no floats, so "007.0" is text.
- Integers of a "string" column are their decimal digits; of a "hex" column, the numbers themselves.
- Booleans, times and nested values are none of these (see `arrow_types`).

Values are plain arrays (`arrow_types.plain_array`). Text is judged by its distinct values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from papilio.data_pipeline.arrow_types import is_text
from papilio.data_pipeline.transforms import binary_buffers

# Every integer up to this one is a float of its own.
_MOST_EXACT = {16: 2**11 - 1, 32: 2**24 - 1, 64: 2**53 - 1}
# As Python, C and Java print floats that may be whole. Hexadecimal text such as 12e4 is none of these.
_FLOAT_PATTERN = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+(?:[eE][+-]?[0-9]+)?|[eE]\+[0-9]+)"
_FLOAT_TEXT = re.compile(_FLOAT_PATTERN.encode())
_NAN_TEXTS = (b"nan", b"NaN", b"-nan")
_INTEGER_TEXT = re.compile(rb"-?[0-9]+")
_HEX_TEXT = re.compile(rb"[0-9a-fA-F]{1,8}")
_MAX_DIGITS = 19  # of an integer of 64 bits
_MAX_SHOWN = 60
_NO_INTEGER = "is not a whole number of 64 bits"
_Read = TypeVar("_Read")
_PRINTED_CALL = re.compile(r"(?:array|tensor|set|frozenset|deque)\((.*)\)", re.DOTALL)
_CLOSING = {"[": "]", "(": ")", "{": "}"}


@dataclass
class Faults:
    """The first fault of each malformed row: row number -> (field, reason)."""

    first_of_row: dict[int, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where the values of a column came from: `rows` [V] is the row of each value."""

    faults: Faults
    name: str
    rows: NDArray[np.int64]

    def refuse(self, positions: NDArray[np.int64], reasons: list[str]) -> None:
        """Note why the values at some positions are malformed."""
        for row, reason in zip(self.rows[positions].tolist(), reasons, strict=True):
            self.faults.first_of_row.setdefault(row, (self.name, reason))


class ValueFaultError(ValueError):
    """A value that is malformed; the message is the reason, to follow the value's own words."""


def shown(value: object) -> str:
    """Return a value as an error shows it: text in quotes, cut at a sane length."""
    if isinstance(value, bytes):
        value = value[: 4 * _MAX_SHOWN].decode(errors="backslashreplace")
    try:
        # Of a long value only the beginning is written out.
        text = repr(value[: 4 * _MAX_SHOWN] if isinstance(value, str | list) else value)
    except RecursionError:
        text = "[[[..." if isinstance(value, list) else "{{{..."
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def integer_of_float(value: float, bits: int = 64) -> int | None:
    """Return the integer that a float id is, None for NaN.

    Raises:
        ValueFaultError: it is a fraction or infinite, or may stand for several integers.
    """
    if math.isnan(value):
        return None
    if not float(value).is_integer():
        raise ValueFaultError(_NO_INTEGER)
    if abs(value) > _MOST_EXACT[bits]:
        raise ValueFaultError(
            f"is a float beyond {_MOST_EXACT[bits]}, where several ids become one; write ids as integers or text"
        )
    return int(value)


def integer_of_text(text: bytes) -> int | None:
    """Return the integer that text of a column of kind "integer" is, None for NaN.

    Raises:
        ValueFaultError: it is none.
    """
    if text in _NAN_TEXTS:
        return None
    if _FLOAT_TEXT.fullmatch(text):
        return integer_of_float(float(text))
    # Python refuses to read thousands of digits: their number is looked at first.
    if not _INTEGER_TEXT.fullmatch(text) or len(text.lstrip(b"-0")) > _MAX_DIGITS:
        raise ValueFaultError(_NO_INTEGER)
    number = -int(text[1:].lstrip(b"0") or b"0") if text.startswith(b"-") else int(text.lstrip(b"0") or b"0")
    if not -(2**63) <= number < 2**63:
        raise ValueFaultError(_NO_INTEGER)
    return number


def hex_of_text(text: bytes) -> int | None:
    """Return the number that text of a column of kind "hex" is, None for NaN.

    Raises:
        ValueFaultError: it is not of 1 to 8 hexadecimal digits.
    """
    if text in _NAN_TEXTS:
        return None
    if not _HEX_TEXT.fullmatch(text):
        raise ValueFaultError("is not an id of at most 8 hexadecimal digits")
    return int(text, 16)


def string_of_text(text: bytes) -> bytes | None:
    """Return the id that text of a column of kind "string" is: itself, the integer of a whole float, None for NaN.

    Raises:
        ValueFaultError: it is not UTF-8, or a float that may stand for several integers.
    """
    if text in _NAN_TEXTS:
        return None
    try:
        text.decode()
    except UnicodeDecodeError:
        raise ValueFaultError("is not UTF-8 text") from None
    if _FLOAT_TEXT.fullmatch(text) and not (number := float(text)) % 1:
        return str(integer_of_float(number)).encode()
    return text


def is_printed_list(text: str) -> bool:
    """Whether text of a bag is a list as a program prints it: `[5, 1]`, `['a' 'b']`, `(1,)`, `{1}`, `array([1])`."""
    text = text.strip()
    if call := _PRINTED_CALL.fullmatch(text):
        return call[1].strip()[:1] in {"", *_CLOSING}
    opening, inner = text[:1], text[1:-1].strip()
    if len(text) < 2 or text[-1] != _CLOSING.get(opening):
        return False
    # `[CLS] a [SEP]` is three ids; a nested or quoted list may hold brackets.
    return text[-1] not in inner or inner.startswith((opening, "'", '"'))


def printed_list_fault(text: str, separator: str) -> str:
    """Say what is wrong with a bag that is a printed list."""
    return (
        f"{shown(text)} is a printed list; write its ids with {separator!r} between them and no brackets, or as a "
        "list (a Parquet or Arrow list column, a JSON array)"
    )


def integers(array: pa.Array, place: Place, *, is_hex: bool = False) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Read ids that are numbers; returns them (0 where missing or malformed) and which are missing."""
    if is_text(array.type):
        return _integers_of_text(array, place, is_hex=is_hex)
    if pa.types.is_floating(array.type):
        return _integers_of_floats(array, place)
    missing = array.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_uint64(array.type) or pa.types.is_decimal(array.type):
        array = _without_faults(array, lambda part: part.cast(pa.int64()), _NO_INTEGER, place)
    values = array.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    return values.copy(), missing


def strings(array: pa.Array, place: Place) -> pa.DictionaryArray:
    """Read ids of kind "string": a dictionary of large binary values without nulls; null indices are missing."""
    if not is_text(array.type):
        if not pa.types.is_integer(array.type):
            values, missing = integers(array, place)
            array = pa.array(values, mask=missing)
        return array.cast(pa.large_string()).cast(pa.large_binary()).dictionary_encode()
    encoded = _blank_to_null(array).dictionary_encode()
    if not _needs_reading(encoded.dictionary):
        return encoded
    read, wrong = _read_each(encoded.dictionary, string_of_text)
    _refuse_distinct(encoded, wrong, place)
    read_array = pa.array(read, pa.large_binary())
    return read_array.take(encoded.indices).dictionary_encode()


def numbers(array: pa.Array, place: Place) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Read numbers as 64-bit floats; returns them (0 where missing or malformed) and which are missing."""
    if is_text(array.type):
        texts = _blank_to_null(array)
        try:
            array = _floats_of_text(texts)
        except pa.ArrowInvalid:
            array = _floats_of_text(_without_faults(texts, _floats_of_text, "is not a number", place))
    # Not checked: a 64-bit integer is rounded, as the same one in text is.
    floats = array.cast(pa.float64(), safe=False)
    values = floats.fill_null(np.nan).to_numpy(zero_copy_only=False).copy()
    missing = np.isnan(values)
    values[missing] = 0.0
    return values, missing


def _floats_of_text(array: pa.Array) -> pa.Array:
    return array.cast(pa.large_string()).cast(pa.float64())


def _integers_of_floats(array: pa.Array, place: Place) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    bits = array.type.bit_width
    values = array.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False).copy()
    missing = np.isnan(values)
    values[missing] = 0.0
    wrong = np.flatnonzero((np.trunc(values) != values) | (np.abs(values) > _MOST_EXACT[bits]))
    place.refuse(wrong, [_reason(lambda v: integer_of_float(v, bits), value) for value in values[wrong].tolist()])
    values[wrong] = 0.0
    return values.astype(np.int64), missing


def _integers_of_text(array: pa.Array, place: Place, *, is_hex: bool) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    texts = _blank_to_null(array)
    if not is_hex and (plain := _plain_integers(texts)) is not None:
        missing = plain.is_null().to_numpy(zero_copy_only=False)
        return plain.fill_null(0).to_numpy(zero_copy_only=False).copy(), missing
    encoded = texts.dictionary_encode()
    read, wrong = _read_each(encoded.dictionary, hex_of_text if is_hex else integer_of_text)
    _refuse_distinct(encoded, wrong, place)
    table = np.array([0 if number is None else number for number in read] + [0], np.int64)
    is_missing = np.array([number is None and code not in wrong for code, number in enumerate(read)] + [True])
    codes = encoded.indices.fill_null(len(read)).to_numpy(zero_copy_only=False)
    return table[codes], is_missing[codes]


def _plain_integers(texts: pa.Array) -> pa.Array | None:
    """Read text that is all decimal digits, all at once; None if some is not."""
    try:
        found = _integers_of_digits(texts)
    except pa.ArrowInvalid:
        return None
    _, data = binary_buffers(texts.fill_null(b""))
    # Arrow reads 0x10, too.
    return None if np.isin(data, np.frombuffer(b"xX", np.uint8)).any() else found


def _integers_of_digits(texts: pa.Array) -> pa.Array:
    return texts.cast(pa.large_string()).cast(pa.int64())


def _needs_reading(distinct: pa.Array) -> bool:
    """Whether some text is not an id as it stands; nearly always none is."""
    try:
        distinct.cast(pa.large_string())
    except pa.ArrowInvalid:
        return True
    if pc.any(pc.is_in(distinct, pa.array(_NAN_TEXTS, pa.large_binary()))).as_py():
        return True
    _, data = binary_buffers(distinct)
    has_float = np.isin(data, np.frombuffer(b".+", np.uint8)).any()
    return bool(has_float and pc.any(pc.match_substring_regex(distinct, f"^(?:{_FLOAT_PATTERN})$")).as_py())


def _read_each(distinct: pa.Array, read: Callable[[bytes], _Read | None]) -> tuple[list[_Read | None], dict[int, str]]:
    """Read each text; returns None and a reason by place for those that are malformed."""
    found: list[_Read | None] = []
    wrong: dict[int, str] = {}
    for code, text in enumerate(distinct.to_pylist()):
        try:
            found.append(read(text) if text else None)
        except ValueFaultError as error:
            found.append(None)
            wrong[code] = f"{shown(text)} {error}"
    return found, wrong


def _refuse_distinct(encoded: pa.DictionaryArray, wrong: dict[int, str], place: Place) -> None:
    if wrong:
        codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        positions = np.flatnonzero(np.isin(codes, list(wrong)))
        place.refuse(positions, [wrong[code] for code in codes[positions].tolist()])


def _reason(read: Callable[[float], object], value: float) -> str:
    try:
        read(value)
    except ValueFaultError as error:
        return f"{value!r} {error}"
    raise AssertionError(f"{value!r} was refused but has no fault")


def _without_faults(array: pa.Array, convert: Callable[[pa.Array], pa.Array], reason: str, place: Place) -> pa.Array:
    """Replace values that `convert` refuses by null, and note them; distinct values are tried one by one."""
    if _converts(array, convert):
        return array
    encoded = array.dictionary_encode()
    distinct = encoded.dictionary
    codes = [code for code in range(len(distinct)) if not _converts(distinct.slice(code, 1), convert)]
    wrong = {code: f"{shown(_as_seen(distinct[code].as_py()))} {reason}" for code in codes}
    _refuse_distinct(encoded, wrong, place)
    is_wrong = pc.is_in(encoded.indices, pa.array(codes, encoded.indices.type))
    return pc.if_else(is_wrong, pa.scalar(None, array.type), array)


def _as_seen(value: object) -> object:
    return value if isinstance(value, bytes | str) else _Plain(str(value))


class _Plain:
    """Shows itself without quotes or a type's name."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _converts(array: pa.Array, convert: Callable[[pa.Array], pa.Array]) -> bool:
    try:
        convert(array)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


def _blank_to_null(array: pa.Array) -> pa.Array:
    return pc.if_else(pc.equal(pc.binary_length(array), 0), pa.scalar(None, array.type), array)
