"""Input files as blocks of whole lines: plain, .gz or .zst, from any iopath path, one block in memory at a time."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
import zstandard
from numpy.typing import NDArray

from papilio.data_pipeline.paths import path_manager
from papilio.data_pipeline.preprocess.bad_rows import PreprocessError

# About 33,000 Criteo rows: the arrays of one column stay in the L2 cache, and codes fit 16 bits.
BLOCK_BYTES = 16 << 20
PADDING_BYTES = 8  # in front of a block's first byte, so that 8 bytes can be read up to the end of any field
_STREAM_CHUNK_BYTES = 1 << 18
_COMPRESSIONS = (".gz", ".zst")
RETURNS_HINT = "lines must end in \\n or \\r\\n, not in \\r alone; convert them (tr '\\r' '\\n' < OLD > NEW)"


@dataclass(frozen=True)
class InputBlock:
    """Some rows of one input file. Plain local text is read by the worker itself (`data` is None), else handed over.

    `crc32` is of the input that the rows come from, None where the worker reads it.
    """

    index: int
    file_index: int
    offset: int
    num_bytes: int
    data: bytes | None = None
    header: tuple[str, ...] | None = None
    crc32: int | None = None


def strip_compression(path: str) -> str:
    """Name of a file without .gz or .zst."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix in _COMPRESSIONS else path


def input_num_bytes(path: str) -> int:
    """Bytes of an input file as stored, -1 where the storage does not tell.

    Raises:
        PreprocessError: there is no such file, or it is empty.
    """
    if not path_manager.isfile(path):
        raise PreprocessError(f"input {path} does not exist or is not a file; correct --input")
    num_bytes = os.path.getsize(path) if os.path.isfile(path) else -1
    if num_bytes == 0:
        raise PreprocessError(f"input {path} is empty (0 bytes); fetch it again, or leave it out")
    return num_bytes


def input_crc32(path: str) -> int:
    """CRC-32 of a whole input as stored."""
    crc32 = 0
    with path_manager.open(path, "rb") as file:
        for chunk in _chunks(file):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32


def read_blocks(path: str, block_bytes: int = BLOCK_BYTES, *, part: int = 1) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield (offset, length, bytes or None) of blocks of whole lines; the cuts depend on the text alone.

    With `part`, blocks are that many times smaller but for a line that is longer.

    Raises:
        PreprocessError: the archive is truncated or damaged, there is no text in it, or a line is longer than a block.
    """
    if strip_compression(path) == path and os.path.isfile(path):
        yield from _cut_local(path, block_bytes, block_bytes // part)
        return
    offset = 0
    for data in _cut_stream(path, block_bytes, block_bytes // part):
        yield offset, len(data), data
        offset += len(data)
    if offset == 0:
        raise PreprocessError(f"input {path} holds no text; fetch it again, or leave it out")


def load_block(block: InputBlock, path: str) -> NDArray[np.uint8]:
    """Return a block's bytes after PADDING_BYTES of padding, ended by a newline even where the file is not."""
    buffer = np.zeros(PADDING_BYTES + block.num_bytes + 1, np.uint8)
    body = buffer[PADDING_BYTES:-1]
    body[:] = np.frombuffer(read_block(block, path), np.uint8)
    buffer[-1] = ord("\n")
    return buffer[:-1] if body[-1] == ord("\n") else buffer


def read_block(block: InputBlock, path: str) -> bytes:
    """Return a block's bytes as they stand in the input."""
    if block.data is not None:
        return block.data
    with open(path, "rb") as file:
        file.seek(block.offset)
        data = file.read(block.num_bytes)
    if len(data) != block.num_bytes:
        raise PreprocessError("the file became shorter while it was read; start again with a whole file")
    return data


def _cut_local(path: str, block_bytes: int, wanted_bytes: int) -> Iterator[tuple[int, int, None]]:
    num_bytes = os.path.getsize(path)
    position = 0
    with open(path, "rb") as file:
        while num_bytes - position > wanted_bytes:
            length = _last_newline(file, position, wanted_bytes) or _last_newline(file, position, block_bytes)
            if length == 0:
                if num_bytes - position <= block_bytes:
                    break
                raise _long_line(path, block_bytes)
            yield position, length, None
            position += length
        if position < num_bytes:
            yield position, num_bytes - position, None


def _last_newline(file: IO[bytes], position: int, block_bytes: int) -> int:
    """Bytes from `position` through the last newline within a block; 0 when there is none."""
    window = 1 << 12
    while True:
        start = max(block_bytes - window, 0)
        file.seek(position + start)
        found = file.read(block_bytes - start).rfind(b"\n")
        if found >= 0 or start == 0:
            return start + found + 1
        window <<= 3


def _cut_stream(path: str, block_bytes: int, wanted_bytes: int) -> Iterator[bytes]:
    held = bytearray()
    for chunk in _decompressed(path):
        held += chunk
        while len(held) > wanted_bytes:
            length = held.rfind(b"\n", 0, wanted_bytes) + 1
            if length == 0 and len(held) <= block_bytes:
                break
            length = length or held.rfind(b"\n", 0, block_bytes) + 1
            if length == 0:
                raise _long_line(path, block_bytes)
            yield bytes(memoryview(held)[:length])
            del held[:length]
    if held:
        yield bytes(held)


def _long_line(path: str, block_bytes: int) -> PreprocessError:
    return PreprocessError(
        f"input {path} has no line end within {block_bytes} bytes; is it a text file with one row a line?"
    )


def _decompressed(path: str) -> Iterator[bytes]:
    try:
        with path_manager.open(path, "rb") as file:
            if path.endswith(".gz"):
                yield from _chunks(gzip.GzipFile(fileobj=file))
            elif path.endswith(".zst"):
                yield from _decompress_zstandard(file)
            else:
                yield from _chunks(file)
    except EOFError:
        raise PreprocessError(
            f"input {path} is truncated: the archive ends before its end mark; fetch it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise PreprocessError(f"input {path} is damaged or not what its name says ({error}); fetch it again") from None


def _chunks(file: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    while chunk := file.read(_STREAM_CHUNK_BYTES):
        yield chunk


def _decompress_zstandard(file: IO[bytes]) -> Iterator[bytes]:
    """Decompress frame after frame; unlike the library's reader, notice that the last one is cut off."""
    decompressor = zstandard.ZstdDecompressor()
    frame = None
    for chunk in _chunks(file):
        rest = chunk
        while rest:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(rest)
            rest = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError
