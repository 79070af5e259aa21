"""Blocks of a checkpoint's tensors, each read whole and held against its checksum; needs no torch."""

from __future__ import annotations

import zlib

from data_pipeline.paths import join
from trainer.checkpoint.format import Block, DamagedError
from trainer.storage import StorageError, exists, file_size, read_range


def read_block(folder: str, key: str, block: Block) -> bytes:
    """Return the bytes of one block of tensor `key`.

    Raises:
        DamagedError: they are missing or damaged.
        StorageError: the storage does not answer.
    """
    path = join(folder, block.file)
    try:
        raw = read_range(path, block.start, block.length)
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
