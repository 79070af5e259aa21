"""Blocks of a checkpoint's tensors, each read whole and held against its checksum; needs no torch."""

from __future__ import annotations

import zlib

from papilio.data_pipeline.inner_path import link_problem
from papilio.data_pipeline.paths import join
from papilio.trainer.checkpoint.format import Block, DamagedError
from papilio.trainer.storage.api import StorageError, exists, file_size, read_into


def read_block(folder: str, key: str, block: Block, memory: memoryview | None = None) -> memoryview:
    """Return the bytes of one block of tensor `key`.

    Args:
        folder: of the checkpoint.
        key: whose block it is, for errors.
        block: where it lies.
        memory: bytes to read it into, at least as many; memory used again is faster than new memory.

    Raises:
        DamagedError: they are missing or damaged.
        StorageError: the storage does not answer.
    """
    path, problem = join(folder, block.file), link_problem(folder, block.file)
    if problem is not None:
        raise DamagedError(f"{problem} ({key})")
    raw = (memoryview(bytearray(block.length)) if memory is None else memory)[: block.length]
    try:
        read_into(raw, path, block.start)
    except StorageError as error:
        if not exists(path):
            raise DamagedError(f"{path} is missing ({key})") from error
        if file_size(path) < block.start + block.length:
            raise DamagedError(f"{path} is damaged: it was cut short ({key})") from error
        raise
    if zlib.crc32(raw) != block.crc32:
        raise DamagedError(
            f"{path} is damaged: bytes {block.start} to {block.start + block.length} ({key}) have another checksum "
            "than when they were written"
        )
    return raw
