"""Whole tensors of a checkpoint, row after row, put together from blocks of rows and columns in little memory."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from papilio.trainer.checkpoint.format import ITEM_BYTES, Block, DamagedError, SavedTensor
from papilio.trainer.checkpoint.read_blocks import read_block

# What is put together at once, of blocks of columns.
CHUNK_BYTES = 16 << 20
Bytes = NDArray[np.uint8]


def stream_tensor(folder: str, key: str, tensor: SavedTensor) -> Iterator[memoryview]:
    """Yield the raw values of tensor `key` from the first to the last.

    Each block is read once and checked; in memory are those that hold a piece of one row: one for each block of
    columns, and CHUNK_BYTES.

    Raises:
        DamagedError: a block is missing or damaged, or the blocks do not make up the tensor.
        StorageError: the storage does not answer.
    """
    row_bytes = _row_items(tensor.shape) * ITEM_BYTES[tensor.dtype]
    rows_at_once = max(1, CHUNK_BYTES // max(1, row_bytes))
    opened: dict[Block, Bytes] = {}
    for first, last, blocks in row_bands(key, tensor):
        # Those that end are dropped before the next ones are read.
        opened = {block: opened[block] for block in blocks if block in opened}
        for block in blocks:
            if block not in opened:
                opened[block] = _as_rows(read_block(folder, key, block), block)
        pieces = [opened[block][first - _rows(block)[0] : last - _rows(block)[0]] for block in blocks]
        if len(pieces) == 1:
            yield pieces[0].data
            continue
        for start in range(0, last - first, rows_at_once):
            yield np.concatenate([piece[start : start + rows_at_once] for piece in pieces], axis=1).data


def row_bands(key: str, tensor: SavedTensor) -> Iterator[tuple[int, int, tuple[Block, ...]]]:
    """Cut a tensor into bands of rows that no block begins or ends within.

    Yields:
        (first row, row after the last, blocks that hold the band by their first column).

    Raises:
        DamagedError: the blocks leave a hole, overlap, or reach beyond the tensor.
    """
    num_rows, num_columns = tensor.shape[0] if tensor.shape else 1, _row_items(tensor.shape)
    if 0 in tensor.shape:
        return
    waiting = deque(sorted((block for block in tensor.blocks if 0 not in block.sizes), key=_rows))
    cuts = sorted({0, num_rows, *(row for block in waiting for row in _rows(block))})
    blocks: list[Block] = []
    for first, last in itertools.pairwise(cuts):
        blocks = [block for block in blocks if _rows(block)[1] > first]
        while waiting and _rows(waiting[0])[0] <= first:
            blocks.append(waiting.popleft())
        blocks.sort(key=_columns)
        ends = [0, *(_columns(block)[1] for block in blocks)]
        if [_columns(block)[0] for block in blocks] != ends[:-1] or ends[-1] != num_columns or last > num_rows:
            raise DamagedError(f"the blocks of {key} do not make up rows {first} to {last} of {list(tensor.shape)}")
        yield first, last, tuple(blocks)


def _row_items(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


def _rows(block: Block) -> tuple[int, int]:
    """First row of a block, and the one after its last; of a scalar, 0 and 1."""
    first = block.offsets[0] if block.offsets else 0
    return first, first + (block.sizes[0] if block.sizes else 1)


def _columns(block: Block) -> tuple[int, int]:
    """First value of each row, and the one after the last; only matrices are cut within rows."""
    first = block.offsets[1] if len(block.offsets) == 2 else 0
    return first, first + _row_items(block.sizes)


def _as_rows(raw: memoryview, block: Block) -> Bytes:
    first, last = _rows(block)
    return np.frombuffer(raw, np.uint8).reshape(last - first, -1)
