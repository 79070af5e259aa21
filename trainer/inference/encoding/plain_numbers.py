"""Columns that are well-formed, read in one go; whatever is not is left to the preprocessing's own, more patient, code.

That code dictionary-encodes a column, which pays for millions of rows and costs 0.2 ms a column for a single one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from papilio.data_pipeline.arrow_types import is_text
from papilio.data_pipeline.preprocess.criteo import decode_hex
from papilio.data_pipeline.preprocess.table_columns import id_limit, must_be_positive
from papilio.data_pipeline.schema import CategoricalColumn
from papilio.data_pipeline.transforms import binary_buffers

HEX_CHARACTERS = 8
_HEX_TEXT = re.compile("[0-9a-fA-F]*")
_IS_HEX = np.array([chr(octet) in "0123456789abcdefABCDEF" for octet in range(256)])

Numbers = tuple[NDArray[Any], NDArray[np.bool_]]  # values, and which are missing


def hex_numbers_of_texts(texts: Sequence[Any]) -> Numbers | None:
    """Read hexadecimal numbers of up to 8 digits, None or "" for missing ones; None if any is something else."""
    values = [text or "" for text in texts]
    if not {str}.issuperset(map(type, values)):
        return None
    text = "".join([value.rjust(HEX_CHARACTERS, "0") for value in values])
    if len(text) != HEX_CHARACTERS * len(values) or _HEX_TEXT.fullmatch(text) is None:
        return None
    words = np.frombuffer(text.encode(), "<u8")
    missing = np.fromiter((not value for value in values), np.bool_, len(values))
    return decode_hex(words, np.full(len(words), HEX_CHARACTERS)), missing


def numbers_of_array(array: pa.Array, column: CategoricalColumn) -> Numbers | None:
    """Read the raw numbers of a one-hot column of kind hex or integer; None if a value is not well-formed."""
    if pa.types.is_integer(array.type):
        return _integers(array, column)
    return _hexadecimal(array) if column.kind == "hex" and is_text(array.type) else None


def hex_numbers_of_arrays(arrays: Sequence[pa.Array]) -> Numbers | None:
    """Read columns of hexadecimal text of one type, one after the other; None if a value is not well-formed."""
    if len({array.type for array in arrays}) != 1 or not is_text(arrays[0].type):
        return None
    return _hexadecimal(pa.concat_arrays(arrays))


def dense_numbers_of_arrays(arrays: Sequence[pa.Array]) -> NDArray[np.float64] | None:
    """Read numeric columns to [I, B], NaN for missing values; None if one is of another type or a value infinite."""
    kinds = pa.types
    if not all(kinds.is_integer(a.type) or kinds.is_floating(a.type) or kinds.is_null(a.type) for a in arrays):
        return None
    if len({array.type for array in arrays}) > 1:
        arrays = [array.cast(pa.float64(), safe=False) for array in arrays]
    # Not checked: a 64-bit integer is rounded, as preprocessing rounds one that it reads from text.
    whole = pa.concat_arrays(arrays).cast(pa.float64(), safe=False)
    numbers = whole.fill_null(np.nan).to_numpy(zero_copy_only=False).reshape(len(arrays), -1)
    return None if np.isinf(numbers).any() else numbers


def _integers(array: pa.Array, column: CategoricalColumn) -> Numbers | None:
    if pa.types.is_uint64(array.type):
        return None
    missing = array.is_null().to_numpy(zero_copy_only=False)
    values = array.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    if must_be_positive(column) and values.min(initial=0) < 0:
        return None
    limit = id_limit(column)
    if limit is not None and values.max(initial=0) >= limit:
        return None
    return values, missing


def _hexadecimal(array: pa.Array) -> Numbers | None:
    offsets, data = binary_buffers(array.fill_null(b""))
    lengths = np.diff(offsets)
    if lengths.max(initial=0) > HEX_CHARACTERS or not _IS_HEX[data].all():
        return None
    padded = np.zeros(HEX_CHARACTERS + len(data), np.uint8)
    padded[HEX_CHARACTERS:] = data
    # Unaligned words: words[p] is the 8 bytes up to where a value that ends at byte p of the data ends.
    words: NDArray[np.uint64] = np.ndarray((len(data) + 1,), "<u8", padded, strides=(1,))
    return decode_hex(words[offsets[1:]], lengths), lengths == 0
