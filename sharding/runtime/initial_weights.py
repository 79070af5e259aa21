"""Initial values of the tables: a pure function of seed, table, row and column, the same under every plan."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from papilio.sharding.compat.torch_internals import ShardedTensor
from papilio.sharding.runtime.table_shards import data_parallel_weights

# Rows drawn together; a shard draws the whole blocks that it touches. Changing it changes every initial weight.
BLOCK_ROWS = 16_384


def initialize_tables(model: nn.Module, seed: int) -> None:
    """Fill this rank's shards of every table in place, and its copies of the data_parallel ones.

    Weights are uniform in +-1/sqrt(rows), as in the DLRM authors' code; drawn on the shard's own kind of device, so
    CPU and GPU runs of one seed start from different values. Drawn in fp32; an fp16 table holds them rounded.
    """
    replicated = data_parallel_weights(model)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if isinstance(weight, ShardedTensor | DTensor):
                num_rows, num_columns = weight.size()
                for shard, (row, column) in _local_shards(weight):
                    _fill(shard, name, seed, row, column, num_rows, num_columns)
            elif name in replicated:
                _fill(weight, name, seed, 0, 0, *weight.shape)


def _local_shards(weight: ShardedTensor | DTensor) -> Iterator[tuple[torch.Tensor, Sequence[int]]]:
    """Yield this rank's shards with their first row and column; TorchRec's replicated tables are DTensors."""
    if isinstance(weight, ShardedTensor):
        yield from ((shard.tensor, shard.metadata.shard_offsets) for shard in weight.local_shards())
    else:
        local: Any = weight.to_local()
        # A rank without a shard of the table has one offset all the same.
        yield from zip(local.local_shards(), local.local_offsets(), strict=False)


def initial_weights(name: str, seed: int, num_rows: int, num_columns: int, device: torch.device) -> torch.Tensor:
    """Return the whole of one table's initial values, [rows, columns] float32; `name` is its state-dict key."""
    weights = torch.empty(num_rows, num_columns, device=device)
    _fill(weights, name, seed, 0, 0, num_rows, num_columns)
    return weights


def _fill(shard: torch.Tensor, name: str, seed: int, row: int, column: int, num_rows: int, num_columns: int) -> None:
    bound = math.sqrt(1 / num_rows)
    stop = row + shard.shape[0]
    for block, begin, end in _blocks(row, stop):
        generator = torch.Generator(device=shard.device)
        generator.manual_seed(_block_seed(name, seed, block))
        values = torch.empty(min(BLOCK_ROWS, num_rows - block * BLOCK_ROWS), num_columns, device=shard.device)
        values.uniform_(-bound, bound, generator=generator)
        inside = values[begin - block * BLOCK_ROWS : end - block * BLOCK_ROWS, column : column + shard.shape[1]]
        shard[begin - row : end - row].copy_(inside)


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (block, first row, end row) of the blocks that rows `start` to `stop` touch."""
    for block in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)):
        yield block, max(start, block * BLOCK_ROWS), min(stop, (block + 1) * BLOCK_ROWS)


def _block_seed(name: str, seed: int, block: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
