"""One column of a table as pyarrow read it (raw bytes of text, or Parquet's types) to labels, numbers or codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipeline.column_codes import ColumnCodes
from data_pipeline.raw_chunk import encode_numbers, encode_strings
from data_pipeline.schema import CategoricalColumn, DenseColumn
from data_pipeline.transforms import count_clipped, transform_dense

_MAX_HEX_DIGITS = 8
_HEX_PATTERN = "^[0-9a-fA-F]{1,8}$"


@dataclass
class Faults:
    """The first fault of each malformed row: row number -> (field, reason)."""

    first_of_row: dict[int, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Place:
    """Where the values of a column came from: `rows` [V] is the row of each value."""

    faults: Faults
    name: str
    rows: NDArray[np.int64]

    def refuse(self, positions: NDArray[np.int64], reasons: list[str]) -> None:
        for row, reason in zip(self.rows[positions].tolist(), reasons, strict=True):
            self.faults.first_of_row.setdefault(row, (self.name, reason))


def labels_of(array: pa.Array, name: str, faults: Faults) -> NDArray[np.uint8]:
    """Read labels, which must be 0 or 1."""
    place = _Place(faults, name, np.arange(len(array)))
    values, missing = _numbers(array, pa.float64(), "a number", place)
    wrong = np.flatnonzero(missing | ((values != 0) & (values != 1)))
    seen = [array[int(row)].as_py() for row in wrong]
    place.refuse(wrong, [f"label is {_show(value)}, must be 0 or 1" for value in seen])
    labels: NDArray[np.uint8] = (values == 1).astype(np.uint8)
    return labels


def dense_values(array: pa.Array, column: DenseColumn, faults: Faults) -> tuple[NDArray[np.float32], int, int]:
    """Read and transform numbers; empty, null and NaN are missing. Returns them, how many are missing, clipped."""
    place = _Place(faults, column.name, np.arange(len(array)))
    values, missing = _numbers(array, pa.float64(), "a number", place)
    missing |= np.isnan(values)
    infinite = np.flatnonzero(np.isinf(values))
    place.refuse(infinite, ["infinite, must be a finite number"] * len(infinite))
    num_clipped = int(count_clipped(values, column.transform))
    return transform_dense(values, missing, column), int(np.count_nonzero(missing)), num_clipped


def categorical_codes(array: pa.Array, column: CategoricalColumn, faults: Faults) -> ColumnCodes:
    """Read and dictionary-encode ids; empty text and null are missing (in a bag: left out)."""
    rows = np.arange(len(array))
    if not column.multi_hot:
        return _codes(array, column, _Place(faults, column.name, rows))
    values, lengths = _flatten(array, column)
    owners = np.repeat(rows, lengths)
    is_present = (
        pc.fill_null(pc.not_equal(pc.binary_length(values), 0), False) if _is_text(values) else values.is_valid()
    )
    present = is_present.to_numpy(zero_copy_only=False)
    codes = _codes(pc.filter(values, is_present), column, _Place(faults, column.name, owners[present]))
    return replace(codes, lengths=np.bincount(owners[present], minlength=len(array)).astype(np.int32))


def _flatten(array: pa.Array, column: CategoricalColumn) -> tuple[pa.Array, NDArray[np.int64]]:
    if _is_text(array):
        array = pc.split_pattern(pc.fill_null(array, b"" if pa.types.is_binary(array.type) else ""), column.separator)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return array.flatten(), lengths


def _codes(array: pa.Array, column: CategoricalColumn, place: _Place) -> ColumnCodes:
    if column.kind == "string":
        return encode_strings(_strings(array, place), column)
    if column.kind == "hex" and _is_text(array):
        values, missing = _hexadecimal(array, place)
    else:
        values, missing = _numbers(array, pa.int64(), "a whole number of 64 bits", place)
    limit = (column.num_buckets or 0) if column.encoding == "identity" else 1 << 32
    if column.encoding == "identity" or column.kind == "hex":
        wrong = np.flatnonzero(~missing & ((values < 0) | (values >= limit)))
        place.refuse(wrong, [f"id {values[i]} is out of range, must be 0 to {limit - 1}" for i in wrong])
        values[wrong] = 0
    return encode_numbers(values, missing if missing.any() else None, column)


def _strings(array: pa.Array, place: _Place) -> pa.Array:
    """Large binary values that are UTF-8; empty ones become null."""
    if not _is_text(array):
        array = array.cast(pa.string())
    array = _without_faults(array, lambda part: part.cast(pa.string()), "UTF-8 text", place)
    array = array.cast(pa.large_binary())
    return pc.if_else(pc.equal(pc.binary_length(array), 0), pa.scalar(None, pa.large_binary()), array)


def _hexadecimal(array: pa.Array, place: _Place) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Text of 1 to 8 hexadecimal digits to numbers, by way of its distinct values."""
    encoded = _blank_to_null(array).cast(pa.large_binary()).dictionary_encode()
    is_hex = pc.match_substring_regex(encoded.dictionary, _HEX_PATTERN).to_numpy(zero_copy_only=False)
    texts = encoded.dictionary.to_pylist()
    table = np.array([int(t, 16) if ok else -1 for t, ok in zip(texts, is_hex, strict=True)] + [0], np.int64)
    values = table[encoded.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False)]
    wrong = np.flatnonzero(values < 0)
    what = f"an id of at most {_MAX_HEX_DIGITS} hexadecimal digits"
    place.refuse(wrong, [f"{_show(array[int(i)].as_py())} is not {what}" for i in wrong])
    values[wrong] = 0
    return values, encoded.indices.is_null().to_numpy(zero_copy_only=False)


def _numbers(array: pa.Array, dtype: pa.DataType, what: str, place: _Place) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Cast to int64 or float64; returns values (0 where missing) and which are missing."""

    def convert(part: pa.Array) -> pa.Array:
        return (part.cast(pa.string()) if _is_text(part) else part).cast(dtype)

    array = _blank_to_null(array)
    numbers = convert(_without_faults(array, convert, what, place))
    missing = numbers.is_null().to_numpy(zero_copy_only=False).copy()
    return numbers.fill_null(0).to_numpy(zero_copy_only=False).copy(), missing


def _without_faults(array: pa.Array, convert: Callable[[pa.Array], pa.Array], what: str, place: _Place) -> pa.Array:
    """Replace values that `convert` refuses by null, and note them."""
    if _converts(array, convert):
        return array
    wrong = np.array([i for i in range(len(array)) if not _converts(array.slice(i, 1), convert)], np.int64)
    place.refuse(wrong, [f"{_show(array[int(i)].as_py())} is not {what}" for i in wrong])
    is_wrong = np.zeros(len(array), np.bool_)
    is_wrong[wrong] = True
    return pc.if_else(pa.array(is_wrong), pa.scalar(None, array.type), array)


def _converts(array: pa.Array, convert: Callable[[pa.Array], pa.Array]) -> bool:
    try:
        convert(array)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


def _blank_to_null(array: pa.Array) -> pa.Array:
    if not _is_text(array):
        return array
    return pc.if_else(pc.equal(pc.binary_length(array), 0), pa.scalar(None, array.type), array)


def _is_text(array: pa.Array) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(array.type) for test in tests)


def _show(value: object) -> str:
    return repr(value.decode(errors="backslashreplace") if isinstance(value, bytes) else value)
