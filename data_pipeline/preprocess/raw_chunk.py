"""One block of raw rows after parsing: what every source hands to the stages that follow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from papilio.data_pipeline.preprocess.bad_rows import BadRow
from papilio.data_pipeline.preprocess.column_codes import ColumnCodes, encode_binary, encode_int64, encode_uint32
from papilio.data_pipeline.schema import NUM_RESERVED_IDS, CategoricalColumn
from papilio.data_pipeline.transforms import hash_binary, hash_integers

_MAX_ROW = 2**31 - 1


@dataclass(frozen=True)
class RawChunk:
    """Rows in input order: `labels` [N] uint8, `dense` [N, I] float32 transformed, a `ColumnCodes` a feature.

    `num_missing` [I] counts empty dense fields, `num_clipped` [I] dense values below what the transform tells apart.
    Lines are numbered from 1 within the block, which has `num_lines`: `line_numbers` [N] are the rows' own, `bad_rows`
    have some, the rest are a header or blank.
    """

    num_lines: int
    line_numbers: NDArray[np.int64]
    labels: NDArray[np.uint8]
    dense: NDArray[np.float32]
    num_missing: NDArray[np.int64]
    columns: tuple[ColumnCodes, ...]
    bad_rows: tuple[BadRow, ...]
    num_clipped: NDArray[np.int64]


def encode_numbers(values: NDArray[Any], missing: NDArray[np.bool_] | None, column: CategoricalColumn) -> ColumnCodes:
    """Dictionary-encode checked integers; the keys of hash and identity columns are row numbers already."""
    keys = keys_of_numbers(values, column)
    return encode_int64(keys, missing) if keys.dtype == np.int64 else encode_uint32(keys, missing)


def keys_of_numbers(values: NDArray[Any], column: CategoricalColumn) -> NDArray[Any]:
    """Return the key of each checked integer: int64, or uint64 below 2**32; row numbers for hash and identity."""
    if column.encoding == "hash":
        return hash_integers(values, column.num_buckets or 0)
    if column.encoding == "identity":
        # The reserved rows lie below, or a missing value would share a row with an id. Beyond any table: the last row.
        rows: NDArray[np.uint64] = np.minimum(values, _MAX_ROW - NUM_RESERVED_IDS).astype(np.uint64)
        return rows + np.uint64(NUM_RESERVED_IDS)
    if column.kind == "hex":
        return values.astype(np.uint64, copy=False)
    return values.astype(np.int64, copy=False)


def encode_strings(values: pa.Array, column: CategoricalColumn) -> ColumnCodes:
    """Dictionary-encode Arrow large binary values, or take a dictionary; keys of hash columns are row numbers."""
    encoded = encode_binary(values)
    if column.encoding == "vocabulary":
        return encoded
    num_keys = len(encoded.keys)
    rows = np.append(hash_binary(encoded.keys, column.num_buckets or 0), np.uint64(0))
    return replace(encode_uint32(rows[encoded.codes], encoded.codes == num_keys), texts=encoded)
