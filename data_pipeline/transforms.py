"""From raw numbers and raw ids to model inputs, the same at preprocessing and at serving (see TRANSFORM_VERSION)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from papilio.data_pipeline.mixing import mix64
from papilio.data_pipeline.schema import NUM_RESERVED_IDS, DenseColumn, DenseTransform

# FNV-1a, 64 bits (Fowler, Noll, Vo).
_FNV_OFFSET = 0xCBF29CE484222325
_FNV_PRIME = 0x100000001B3


# Below so many keys a loop over their bytes is faster than arrays, which take 13 us a byte of the longest: 12 s for a
# single key of 900 kB, in which a server would score nothing else.
_FEW_KEYS = 64
_64_BITS = (1 << 64) - 1


def transform_dense(
    values: NDArray[np.float64], missing: NDArray[np.bool_], column: DenseColumn
) -> NDArray[np.float32]:
    """Apply a dense column's transform, in float64, rounded once to float32.

    `log1p` is log(1 + max(x, 0)): Criteo's counts go down to -3.
    What does not fit becomes infinite; callers refuse it with `dense_fault`.
    """
    with np.errstate(over="ignore"):
        if column.transform == "log1p":
            result = np.log1p(np.maximum(values, 0.0)).astype(np.float32)
        else:
            result = values.astype(np.float32)
    result[missing] = np.float32(column.missing_value)
    return result


def count_clipped(values: NDArray[np.float64], transform: DenseTransform) -> Any:
    """Count the values [N] or [N, I] that `transform_dense` makes one and the same: those below 0, with log1p."""
    is_clipped = values < 0 if transform == "log1p" else np.zeros(values.shape, np.bool_)
    return is_clipped.sum(axis=0, dtype=np.int64)


def dense_fault(value: float) -> str:
    """Say what is wrong with a number that is infinite or does not fit 32 bits."""
    if np.isinf(value):
        return "infinite, must be a finite number"
    return f"{value!r} is too large for 32 bits, must be between -3.4e38 and 3.4e38"


def hash_integers(keys: NDArray[Any], num_buckets: int) -> NDArray[np.uint64]:
    """Map integers to rows: NUM_RESERVED_IDS + splitmix64(key) % (num_buckets - NUM_RESERVED_IDS).

    Negative keys count as their two's complement.
    """
    unsigned = keys.astype(np.int64).view(np.uint64) if keys.dtype.kind == "i" else keys.astype(np.uint64)
    return _to_rows(mix64(unsigned), num_buckets)


def hash_binary(keys: pa.Array, num_buckets: int) -> NDArray[np.uint64]:
    """Map Arrow large binary values to rows: as `hash_integers` of the 64-bit FNV-1a hash of the bytes."""
    return _to_rows(mix64(fnv1a(keys)), num_buckets)


def fnv1a(keys: pa.Array) -> NDArray[np.uint64]:
    """64-bit FNV-1a hashes of Arrow large binary values."""
    offsets, data = binary_buffers(keys)
    starts, lengths = offsets[:-1], np.diff(offsets)
    hashes = np.full(len(starts), _FNV_OFFSET, np.uint64)
    alive = np.flatnonzero(lengths > 0)
    position = 0
    while len(alive) > _FEW_KEYS:
        octets = data[starts[alive] + position].astype(np.uint64)
        hashes[alive] = (hashes[alive] ^ octets) * np.uint64(_FNV_PRIME)
        position += 1
        alive = alive[lengths[alive] > position]
    for key in alive.tolist():
        value = int(hashes[key])
        for octet in data[starts[key] + position : starts[key] + lengths[key]].tobytes():
            value = ((value ^ octet) * _FNV_PRIME) & _64_BITS
        hashes[key] = value
    return hashes


def binary_buffers(array: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Offsets [U + 1] (from 0) and bytes of an Arrow large binary array without nulls."""
    _, offsets_buffer, data_buffer = array.buffers()
    if len(array) == 0:
        return np.zeros(1, np.int64), np.empty(0, np.uint8)
    offsets = np.frombuffer(offsets_buffer, np.int64, len(array) + 1, array.offset * 8)
    num_bytes = int(offsets[-1] - offsets[0])
    data = np.frombuffer(data_buffer, np.uint8, num_bytes, int(offsets[0])) if num_bytes else np.empty(0, np.uint8)
    return offsets - offsets[0], data


def binary_array(offsets: NDArray[np.int64], data: NDArray[np.uint8]) -> pa.Array:
    """Inverse of `binary_buffers`."""
    buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(data.tobytes())]
    return pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)


def _to_rows(hashes: NDArray[np.uint64], num_buckets: int) -> NDArray[np.uint64]:
    return np.uint64(NUM_RESERVED_IDS) + hashes % np.uint64(num_buckets - NUM_RESERVED_IDS)
