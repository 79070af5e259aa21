"""CRC-32 of large files by all cores: pieces are summed in threads and their sums put together. Needs only Python."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

# What a thread sums at a time; of a file that has less, threads would save less than they cost.
PIECE_BYTES = 16 << 20
# Read into memory that is used again and again, and still in the processor's cache when it is summed.
_READ_BYTES = 1 << 20
_POLYNOMIAL = 0xEDB88320
_buffers = threading.local()


def file_crc32(
    path: str, on_bytes: Callable[[int], None] = lambda num_bytes: None, piece_bytes: int = PIECE_BYTES
) -> int:
    """Return the CRC-32 (zlib's) of a local file.

    Args:
        path: the file.
        on_bytes: hears of every piece that was read.
        piece_bytes: what a thread sums at a time.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        descriptor, num_bytes = file.fileno(), os.fstat(file.fileno()).st_size
        pieces = [(start, min(piece_bytes, num_bytes - start)) for start in range(0, num_bytes, piece_bytes)]
        if len(pieces) <= 1:
            on_bytes(num_bytes)
            return _piece_crc32(descriptor, 0, num_bytes)
        crc32 = 0
        with ThreadPoolExecutor(min(len(pieces), len(os.sched_getaffinity(0)))) as pool:
            sums = pool.map(lambda piece: _piece_crc32(descriptor, *piece), pieces)
            for (_, length), found in zip(pieces, sums, strict=True):
                crc32 = join_crc32(crc32, found, length)
                on_bytes(length)
    return crc32


def join_crc32(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32 of two runs of bytes of those of each; `second_bytes` is the length of the second.

    As zlib's crc32_combine: the first sum, as a polynomial over GF(2), is moved by as many zero bits.
    """
    shift, power, left = 0x80000000, 0x00800000, second_bytes  # x^0, and x^8 for one byte
    while left:
        if left & 1:
            shift = _times(shift, power)
        power, left = _times(power, power), left >> 1
    return _times(shift, first) ^ second


def _times(one: int, other: int) -> int:
    """Return the product of two polynomials modulo the CRC's, the highest bit being x^0."""
    product = 0
    for bit in range(31, -1, -1):
        if one >> bit & 1:
            product ^= other
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product


def _piece_crc32(descriptor: int, start: int, length: int) -> int:
    if not hasattr(_buffers, "memory"):
        _buffers.memory = memoryview(bytearray(_READ_BYTES))
    memory: memoryview = _buffers.memory
    crc32, end = 0, start + length
    while start < end:
        num_read = os.preadv(descriptor, [memory[: min(_READ_BYTES, end - start)]], start)
        if num_read == 0:
            break  # cut short meanwhile: the sum will not be right
        crc32 = zlib.crc32(memory[:num_read], crc32)
        start += num_read
    return crc32
