"""A categorical column of one block, dictionary-encoded: sorted distinct keys, their counts, and a code per value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_POSITION_BITS = 24  # which leaves room for a 32-bit key and a mark of missing ones
_KEY_BITS = 32


@dataclass(frozen=True)
class ColumnCodes:
    """Values of one column in a block.

    `keys` [U] are sorted: uint32 or int64, or Arrow binary for strings. `codes` [V] point into them; U is the code of a
    missing value. `counts` [U + 1] says how often each code occurs. `lengths` [N] are the bags' sizes, None when
    one-hot. `texts` are the same values with the strings themselves as keys, where the keys are hashes of these.
    """

    keys: NDArray[Any] | pa.Array
    counts: NDArray[np.uint32]
    codes: NDArray[Any]
    lengths: NDArray[np.int32] | None = None
    texts: ColumnCodes | None = None


def encode_uint32(values: NDArray[np.uint64], missing: NDArray[np.bool_] | None) -> ColumnCodes:
    """Dictionary-encode values below 2**32 held in uint64, by one sort of (value, position) pairs."""
    num_values = len(values)
    if num_values >= 1 << _POSITION_BITS:  # long bags; slower
        encoded = encode_int64(values.astype(np.int64), missing)
        return replace(encoded, keys=encoded.keys.astype(np.uint32))
    packed = values << np.uint64(_POSITION_BITS)
    packed |= np.arange(num_values, dtype=np.uint64)
    if missing is not None:
        packed |= missing.astype(np.uint64) << np.uint64(_POSITION_BITS + _KEY_BITS)
    packed.sort()
    positions = (packed & np.uint64((1 << _POSITION_BITS) - 1)).view(np.int64)
    packed >>= np.uint64(_POSITION_BITS)
    num_present = num_values - (0 if missing is None else int(np.count_nonzero(missing)))
    return _encode_sorted(packed[:num_present].astype(np.uint32), positions, num_values)


def encode_int64(values: NDArray[np.int64], missing: NDArray[np.bool_] | None) -> ColumnCodes:
    """Dictionary-encode 64-bit integers."""
    positions = np.argsort(values, kind="stable")
    if missing is not None and missing.any():
        is_last = missing[positions]
        positions = np.concatenate([positions[~is_last], positions[is_last]])
        return _encode_sorted(values[positions[: int(np.count_nonzero(~missing))]], positions, len(values))
    return _encode_sorted(values[positions], positions, len(values))


def encode_binary(values: pa.Array) -> ColumnCodes:
    """Dictionary-encode Arrow large binary values, or take a dictionary of them; nulls are missing."""
    encoded = values if pa.types.is_dictionary(values.type) else values.cast(pa.large_binary()).dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    num_keys = len(order)
    code_of = np.empty(num_keys + 1, np.int64)
    code_of[order] = np.arange(num_keys)
    code_of[num_keys] = num_keys
    codes = code_of[encoded.indices.fill_null(num_keys).to_numpy(zero_copy_only=False)]
    counts = np.bincount(codes, minlength=num_keys + 1).astype(np.uint32)
    return ColumnCodes(encoded.dictionary.take(pa.array(order)), counts, codes.astype(_code_dtype(num_keys)))


def _encode_sorted(sorted_values: NDArray[Any], positions: NDArray[np.int64], num_values: int) -> ColumnCodes:
    """`positions[:len(sorted_values)]` are where the sorted values stood, the rest are missing."""
    num_present = len(sorted_values)
    is_first = np.empty(num_present, np.bool_)
    is_first[:1] = True
    np.not_equal(sorted_values[1:], sorted_values[:-1], out=is_first[1:])
    first = np.flatnonzero(is_first)
    num_keys = len(first)
    dtype = _code_dtype(num_keys)
    codes = np.full(num_values, num_keys, dtype)
    # Unsigned arithmetic wraps: the sum of flags starts at 1, a code at 0.
    codes[positions[:num_present]] = np.cumsum(is_first, dtype=dtype) - dtype.type(1)
    counts = np.empty(num_keys + 1, np.uint32)
    counts[:num_keys] = np.diff(first, append=num_present)
    counts[num_keys] = num_values - num_present
    return ColumnCodes(sorted_values[first], counts, codes)


def _code_dtype(num_keys: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if num_keys < 1 << 16 else np.uint32)
