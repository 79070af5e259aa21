"""Tensors as torch.distributed.checkpoint (DCP) sees them: rectangles that this rank holds, of a known whole."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from papilio.trainer.checkpoint.format import BLOCK_BYTES, LostTableError, coverage_problem


@dataclass(frozen=True)
class Piece:
    """The values of a tensor from `offsets` on."""

    offsets: tuple[int, ...]
    values: torch.Tensor


class Pieces:
    """A tensor of which this rank has some pieces, maybe none; DCP asks for them by the methods with underscores.

    The same for saving, where they are read, and loading, where they are filled; and the same for tables of every
    sharding type, for which TorchRec itself has three kinds of tensor and as many kinds of key.
    """

    def __init__(self, shape: Iterable[int], dtype: torch.dtype, pieces: Iterable[Piece]) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.pieces = list(pieces)
        self._by_offsets = {torch.Size(piece.offsets): piece for piece in self.pieces}

    def size(self) -> torch.Size:
        """Size of the whole tensor, which DCP holds against the saved one's."""
        return self.shape

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        """Return what to write, an item for each piece."""
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Return what to read."""
        return [ChunkStorageMetadata(torch.Size(piece.offsets), piece.values.size()) for piece in self.pieces]

    def at(self, index: MetadataIndex) -> torch.Tensor:
        """Return the memory of one piece."""
        assert index.offset is not None
        return self._by_offsets[index.offset].values.detach()

    def in_blocks(self) -> Pieces:
        """Return the same values, cut into blocks."""
        return Pieces(self.shape, self.dtype, [block for piece in self.pieces for block in row_blocks(piece)])

    def snapshot(self, reuse: Pieces | None = None) -> Pieces:
        """Return a copy in host memory that training does not change, in that of an earlier copy if there is one."""
        copies = (
            [piece.values for piece in reuse.pieces] if reuse is not None else [_host_memory(p) for p in self.pieces]
        )
        for copy, piece in zip(copies, self.pieces, strict=True):
            copy.copy_(piece.values.detach())
        pieces = [Piece(piece.offsets, copy) for piece, copy in zip(self.pieces, copies, strict=True)]
        return Pieces(self.shape, self.dtype, pieces)


def _host_memory(piece: Piece) -> torch.Tensor:
    """Memory for a copy of a piece; a GPU copies into pinned memory several times as fast."""
    return torch.empty(piece.values.shape, dtype=piece.values.dtype, pin_memory=piece.values.is_cuda)


class PiecesSavePlanner(DefaultSavePlanner):
    """DCP's own planner, for `Pieces`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Check that the ranks' pieces are the whole of each tensor; DCP's own check does not say what is missing.

        Raises:
            LostTableError: they are not.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        # A set, for tensors that every rank holds are planned by every rank.
        rectangles = defaultdict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]](set)
        for item in (item for plan in all_plans for item in plan.items):
            assert item.tensor_data is not None
            chunk, shapes[item.index.fqn] = item.tensor_data.chunk, tuple(item.tensor_data.size)
            rectangles[item.index.fqn].add((tuple(chunk.offsets), tuple(chunk.sizes)))
        problems = {key: coverage_problem(shapes[key], found) for key, found in sorted(rectangles.items())}
        lost = [f"{key} ({problem})" for key, problem in problems.items() if problem is not None]
        if lost:
            raise LostTableError.of(lost)
        return super().create_global_plan(all_plans)

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """Return what to write; DCP's own looks for pieces in subclasses of Tensor only."""
        pieces: Pieces = self.state_dict[index.fqn]
        return pieces.at(index)


class PiecesLoadPlanner(DefaultLoadPlanner):
    """DCP's own planner, for `Pieces`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take in what to load; DCP's own puts None in the place of what it does not know."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Return where to read to; DCP's own looks for pieces in subclasses of Tensor only."""
        pieces: Pieces = self.state_dict[index.fqn]
        return pieces.at(index)


def row_blocks(piece: Piece) -> Iterable[Piece]:
    """Cut a piece into blocks of whole rows, each of at most BLOCK_BYTES (or one row)."""
    values = piece.values
    if not values.dim():
        yield piece
        return
    row_bytes = values.element_size() * math.prod(values.shape[1:])
    rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, len(values), rows):
        yield Piece((piece.offsets[0] + start, *piece.offsets[1:]), values[start : start + rows])
