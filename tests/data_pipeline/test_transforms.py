import math

import numpy as np
import pyarrow as pa

from papilio.data_pipeline.schema import DenseColumn
from papilio.data_pipeline.transforms import (
    binary_array,
    binary_buffers,
    fnv1a,
    hash_binary,
    hash_integers,
    transform_dense,
)


def test_log1p_clamps_and_fills_missing():
    values = np.array([-3.0, 0.0, 1.0, 1e12, 5.0])
    missing = np.array([False, False, False, False, True])
    result = transform_dense(values, missing, DenseColumn(name="x", missing_value=-1.0))
    assert result.dtype == np.float32
    assert result.tolist() == [0.0, 0.0, np.float32(math.log(2)), np.float32(math.log1p(1e12)), -1.0]


def test_identity_keeps_the_number():
    column = DenseColumn(name="x", transform="identity")
    assert transform_dense(np.array([-3.5]), np.array([False]), column).tolist() == [-3.5]


def test_fnv1a_is_the_same_by_arrays_and_for_few_or_long_keys() -> None:
    def one(key: bytes) -> int:
        value = 0xCBF29CE484222325
        for octet in key:
            value = (value ^ octet) * 0x100000001B3 % 2**64
        return value

    keys = [bytes(range(i % 256)) * (1 + i // 50) for i in range(150)]
    for chosen in (keys, keys[:3], [b"x" * 100_000, b""]):  # the last took 1.3 s
        assert fnv1a(pa.array(chosen, pa.large_binary())).tolist() == [one(key) for key in chosen]


def test_fnv1a_test_vectors():
    # From the FNV reference code: fnv64a of "", "a", "foobar".
    keys = pa.array([b"", b"a", b"foobar"], pa.large_binary())
    assert fnv1a(keys).tolist() == [0xCBF29CE484222325, 0xAF63DC4C8601EC8C, 0x85944171F73967E8]


def test_hashed_rows_spare_the_reserved_ones():
    # splitmix64(0) = 0xE220A8397B1DCDAF, splitmix64(2**64 - 1) = 0xE4D971771B652C20 (published test values).
    rows = hash_integers(np.array([0, -1]), 1002)
    assert rows.tolist() == [2 + 0xE220A8397B1DCDAF % 1000, 2 + 0xE4D971771B652C20 % 1000]
    strings = hash_binary(pa.array([f"{i}".encode() for i in range(500)], pa.large_binary()), 50)
    assert (strings.min(), strings.max()) == (2, 49)


def test_binary_buffers_round_trip_slices():
    array = pa.array([b"skipped", b"one", b"", b"three"], pa.large_binary())[1:]
    assert binary_array(*binary_buffers(array)).to_pylist() == [b"one", b"", b"three"]
    assert binary_array(*binary_buffers(array[:0])).to_pylist() == []
