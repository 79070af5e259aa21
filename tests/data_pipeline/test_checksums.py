"""CRC-32 of a file by pieces is zlib's of the whole."""

import random
import zlib

import pytest

from papilio.data_pipeline.checksums import file_crc32, join_crc32


@pytest.mark.parametrize("num_bytes", [0, 1, 999, 1000, 1001, 12_345])
def test_the_sum_of_pieces_is_that_of_the_whole(tmp_path, num_bytes):
    data = random.Random(num_bytes).randbytes(num_bytes)
    (tmp_path / "file").write_bytes(data)
    read = []
    assert file_crc32(str(tmp_path / "file"), read.append, piece_bytes=1000) == zlib.crc32(data)
    assert sum(read) == num_bytes


@pytest.mark.parametrize("second", [b"", b"b", bytes(100_000)])
def test_two_sums_are_joined(second):
    assert join_crc32(zlib.crc32(b"first"), zlib.crc32(second), len(second)) == zlib.crc32(b"first" + second)
