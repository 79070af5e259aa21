"""How torch.distributed.checkpoint (DCP) writes and reads our files, instead of its own, whose metadata is a pickle."""

from __future__ import annotations

import os
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future as ConcurrentFuture
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from papilio.data_pipeline.paths import join
from papilio.trainer.checkpoint.format import PART_BYTES, ROW_WISE_KEY, Block, CheckpointError, Index, SavedTensor
from papilio.trainer.checkpoint.read_blocks import read_block
from papilio.trainer.storage.api import write_file

# Blocks that a rank reads at once: the checksum of one is computed while others arrive.
READERS = 2


class PartFileWriter(StorageWriter):
    """Writes each rank's blocks into part files; then `finish` gets the index on the coordinator."""

    def __init__(
        self, folder: str, column_starts: Mapping[str, tuple[int, ...]], finish: Callable[[Index], None]
    ) -> None:
        """`column_starts` are by table; `finish` is called on one rank, when every rank has written everything."""
        self._folder = folder
        self._column_starts = column_starts
        self._finish = finish
        self._rank = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin; the folder is known already."""

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, rank: int = 0, **kwargs: Any) -> None:
        """Take the rank's number."""
        self._rank = rank

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Change nothing."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Change nothing."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's share."""
        results: list[WriteResult] = []
        for number, items in enumerate(_parts(plan.items)):
            file = f"rank_{self._rank:05}_part_{number:05}.bin"
            blocks = self._write_part(join(self._folder, file), file, items, planner)
            results += [WriteResult(item.index, block.length, block) for item, block in zip(items, blocks, strict=True)]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Gather the ranks' blocks into the index."""
        blocks = defaultdict(list)
        for result in (result for of_rank in results for result in of_rank):
            blocks[result.index.fqn].append(result.storage_data)
        tensors = {
            key: SavedTensor(
                dtype=_dtype_name(tensor.properties.dtype),
                shape=tuple(tensor.size),
                blocks=tuple(sorted(blocks[key], key=lambda block: block.offsets)),
                column_starts=self._column_starts[row_wise[1]] if (row_wise := ROW_WISE_KEY.fullmatch(key)) else None,
            )
            for key, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        self._finish(Index(tensors))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path."""
        return True

    def _write_part(self, path: str, file: str, items: list[WriteItem], planner: SavePlanner) -> list[Block]:
        def raw_values() -> Iterator[memoryview]:
            blocks.clear()
            start = 0
            for item in items:
                assert item.tensor_data is not None
                values = planner.resolve_data(item)
                assert isinstance(values, torch.Tensor)
                # The sum is NaN or infinite if a value is, and 15 times as fast; it may also just be too large.
                if values.is_floating_point() and not (values.sum().isfinite() or values.isfinite().all()):
                    raise CheckpointError(
                        f"{item.index.fqn} holds NaN or infinite values, from which nothing can go on"
                    )
                raw = raw_bytes(values)
                chunk = item.tensor_data.chunk
                place = (tuple(chunk.offsets), tuple(chunk.sizes))
                blocks.append(Block(*place, file, start, len(raw), zlib.crc32(raw)))
                start += len(raw)
                yield raw

        blocks: list[Block] = []
        write_file(path, raw_values)
        return blocks


class PartFileReader(StorageReader):
    """Reads blocks, each once, checks them and hands out what the load plan wants of them."""

    def __init__(self, folder: str, index: Index) -> None:
        self._folder = folder
        self._index = index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin; the folder is known already."""

    def read_metadata(self, *_: Any, **kwargs: Any) -> Metadata:
        """Return the index in DCP's words."""
        return Metadata(
            {
                key: TensorStorageMetadata(
                    TensorProperties(dtype=getattr(torch, tensor.dtype)),
                    torch.Size(tensor.shape),
                    [ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.sizes)) for b in tensor.blocks],
                )
                for key, tensor in self._index.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Change nothing."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Change nothing."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's share, in the order of the files."""
        wanted: dict[tuple[str, tuple[int, ...]], list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            assert item.storage_index.offset is not None
            wanted[item.storage_index.fqn, tuple(item.storage_index.offset)].append(item)
        blocks = [
            (key, block)
            for key in {key for key, _ in wanted}
            for block in self._index.tensors[key].blocks
            if (key, block.offsets) in wanted
        ]
        blocks.sort(key=lambda found: (found[1].file, found[1].start))
        for (key, block), raw in zip(blocks, self._read_ahead(blocks), strict=True):
            self._hand_out(key, block, raw, wanted[key, block.offsets], planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path."""
        return True

    def _read_ahead(self, blocks: list[tuple[str, Block]]) -> Iterator[memoryview]:
        """Yield the bytes of blocks in turn, the next ones being read meanwhile; each is gone with the next."""
        most = max((block.length for _, block in blocks), default=0)
        memory = deque(memoryview(bytearray(most)) for _ in range(READERS + 1))
        under_way = deque[ConcurrentFuture[memoryview]]()
        with ThreadPoolExecutor(READERS, thread_name_prefix="read") as executor:
            for key, block in blocks:
                if len(under_way) == len(memory):
                    yield under_way.popleft().result()
                under_way.append(executor.submit(read_block, self._folder, key, block, memory[0]))
                memory.rotate(-1)
            while under_way:
                yield under_way.popleft().result()

    def _hand_out(self, key: str, block: Block, raw: memoryview, items: list[ReadItem], planner: LoadPlanner) -> None:
        dtype = getattr(torch, self._index.tensors[key].dtype)
        values = torch.frombuffer(raw, dtype=dtype).view(block.sizes)
        for item in items:
            window = tuple(
                slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True)
            )
            target = planner.resolve_tensor(item)
            target.copy_(values[window])
            planner.commit_tensor(item, target)


def raw_bytes(values: torch.Tensor) -> memoryview:
    """Return a tensor's values as bytes, without a copy where they lie in host memory one after the other."""
    flat = values.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def _parts(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """Divide items over files of PART_BYTES or, where one item is larger, the item."""
    part: list[WriteItem] = []
    part_bytes = 0
    for item in items:
        size = item.tensor_storage_size() or 0
        if part and part_bytes + size > PART_BYTES:
            yield part
            part, part_bytes = [], 0
        part.append(item)
        part_bytes += size
    if part:
        yield part


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
