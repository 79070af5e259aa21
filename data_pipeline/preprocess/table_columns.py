"""One column of a table (text, or any type that `arrow_types` allows) to labels, numbers or codes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from papilio.data_pipeline.arrow_types import is_text, open_lists, plain_array
from papilio.data_pipeline.preprocess.column_codes import ColumnCodes
from papilio.data_pipeline.preprocess.raw_chunk import encode_numbers, encode_strings
from papilio.data_pipeline.raw_values import (
    Faults,
    Place,
    integers,
    is_printed_list,
    numbers,
    printed_list_fault,
    shown,
    strings,
)
from papilio.data_pipeline.schema import CategoricalColumn, DenseColumn
from papilio.data_pipeline.transforms import binary_buffers, count_clipped, dense_fault, transform_dense

_LAST_BYTES_OF_LISTS = np.frombuffer(b"])} \t\r\n", np.uint8)
_HEX_LIMIT = 1 << 32


def labels_of(array: pa.Array, name: str, faults: Faults) -> NDArray[np.uint8]:
    """Read labels, which must be 0 or 1."""
    array = plain_array(array)
    place = Place(faults, name, np.arange(len(array)))
    values, missing = numbers(array, place)
    wrong = np.flatnonzero(missing | ((values != 0) & (values != 1)))
    place.refuse(wrong, [f"label is {shown(array[int(row)].as_py())}, must be 0 or 1" for row in wrong])
    labels: NDArray[np.uint8] = (values == 1).astype(np.uint8)
    return labels


def dense_values(array: pa.Array, column: DenseColumn, faults: Faults) -> tuple[NDArray[np.float32], int, int]:
    """Read and transform numbers; returns them, how many are missing, and how many the transform clipped."""
    array = plain_array(array)
    place = Place(faults, column.name, np.arange(len(array)))
    values, missing = numbers(array, place)
    result = transform_dense(values, missing, column)
    wrong = np.flatnonzero(np.isinf(values) | np.isinf(result))
    place.refuse(wrong, [dense_fault(value) for value in values[wrong].tolist()])
    num_clipped = int(count_clipped(values, column.transform))
    return result, int(np.count_nonzero(missing)), num_clipped


def categorical_codes(array: pa.Array, column: CategoricalColumn, faults: Faults) -> ColumnCodes:
    """Read and dictionary-encode ids; in a bag, missing ones are left out."""
    rows = np.arange(len(array))
    if not column.multi_hot:
        return _codes(plain_array(array), column, Place(faults, column.name, rows))[0]
    values, lengths = _open_bags(array, column, Place(faults, column.name, rows))
    owners = np.repeat(rows, lengths)
    codes, is_present = _codes(values, column, Place(faults, column.name, owners))
    return replace(codes, lengths=np.bincount(owners[is_present], minlength=len(array)).astype(np.int32))


def id_limit(column: CategoricalColumn) -> int | None:
    """What the raw numbers of a column are below; None if all whole numbers are allowed."""
    if column.encoding == "identity":
        return column.num_buckets
    return _HEX_LIMIT if column.kind == "hex" else None


def must_be_positive(column: CategoricalColumn) -> bool:
    """Whether a column takes no negative numbers."""
    return column.encoding == "identity" or column.kind == "hex"


def _open_bags(array: pa.Array, column: CategoricalColumn, place: Place) -> tuple[pa.Array, NDArray[np.int64]]:
    array = plain_array(array)
    if not is_text(array.type):
        return open_lists(array)
    texts = array.fill_null(b"")
    for row in _maybe_printed(texts):
        text = texts[int(row)].as_py().decode(errors="backslashreplace")
        if is_printed_list(text):
            place.refuse(np.array([row]), [printed_list_fault(text, column.separator)])
    return open_lists(pc.split_pattern(texts, column.separator))


def _maybe_printed(texts: pa.Array) -> NDArray[np.int64]:
    """Places of texts that end as printed lists do, found at the cost of one byte each."""
    offsets, data = binary_buffers(texts)
    filled = np.flatnonzero(np.diff(offsets))
    return filled[np.isin(data[offsets[filled + 1] - 1], _LAST_BYTES_OF_LISTS)]


def _codes(array: pa.Array, column: CategoricalColumn, place: Place) -> tuple[ColumnCodes, NDArray[np.bool_]]:
    """Codes of values, in a bag of those that are present only, and which these are."""
    if column.kind == "string":
        encoded = strings(array, place)
        is_present = encoded.is_valid().to_numpy(zero_copy_only=False)
        return encode_strings(encoded.drop_null() if column.multi_hot else encoded, column), is_present
    values, missing = integers(array, place, is_hex=column.kind == "hex")
    _check_range(values, missing, column, place)
    if column.multi_hot:
        return encode_numbers(values[~missing], None, column), ~missing
    return encode_numbers(values, missing if missing.any() else None, column), ~missing


def _check_range(
    values: NDArray[np.int64], missing: NDArray[np.bool_], column: CategoricalColumn, place: Place
) -> None:
    if not must_be_positive(column):
        return
    limit = id_limit(column)
    is_wrong = values < 0 if limit is None else (values < 0) | (values >= limit)
    wrong = np.flatnonzero(~missing & is_wrong)
    allowed = "0 or more" if limit is None else f"0 to {limit - 1}"
    place.refuse(wrong, [f"id {values[i]} is out of range, must be {allowed}" for i in wrong])
    values[wrong] = 0
