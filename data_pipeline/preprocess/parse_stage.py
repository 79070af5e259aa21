"""First stage: raw blocks to staged chunks of numbers and codes, in parallel."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from papilio.data_pipeline.array_file import ArrayFile, write_arrays
from papilio.data_pipeline.manifest import DenseStats
from papilio.data_pipeline.paths import path_manager
from papilio.data_pipeline.preprocess.bad_rows import BadRow, BadRows, PreprocessError
from papilio.data_pipeline.preprocess.byte_blocks import InputBlock, input_crc32, load_block, read_block, read_blocks
from papilio.data_pipeline.preprocess.column_symptoms import ColumnSymptoms, symptoms_of
from papilio.data_pipeline.preprocess.criteo import parse_criteo
from papilio.data_pipeline.preprocess.raw_chunk import RawChunk
from papilio.data_pipeline.preprocess.stage_folder import Stage
from papilio.data_pipeline.preprocess.table_source import (
    delimiter_of,
    parse_header,
    parse_parquet_batch,
    parse_text_block,
    read_parquet_batches,
)
from papilio.data_pipeline.preprocess.work_pool import WorkPool
from papilio.data_pipeline.progress import Progress
from papilio.data_pipeline.schema import Schema
from papilio.data_pipeline.transforms import binary_buffers

# A bag's ids may take two characters each: four times as many values in a block as a table of single ids has.
_PARTS_WITH_BAGS = 4


@dataclass(frozen=True)
class ParseTask:
    """One block to parse and stage."""

    block: InputBlock
    path: str
    source: str
    schema: Schema
    stage: Stage


@dataclass
class Parsed:
    """What the first stage knows in the end: rows of each chunk and file, and sums over the dense columns."""

    num_dense: int
    num_files: int
    symptoms: ColumnSymptoms
    chunk_rows: list[int] = field(default_factory=list)
    input_crc32: int = 0
    rows_per_file: list[int] = field(init=False)
    num_missing: NDArray[np.int64] = field(init=False)
    sums: NDArray[np.float64] = field(init=False)
    extremes: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.rows_per_file = [0] * self.num_files
        self.num_missing = np.zeros(self.num_dense, np.int64)
        self.sums = np.zeros((2, self.num_dense))
        self.extremes = np.full((2, self.num_dense), [[np.inf], [-np.inf]])

    def add(self, file_index: int, meta: dict[str, Any]) -> None:
        """Count a chunk in, in input order (the sums are of floats)."""
        self.chunk_rows.append(meta["num_rows"])
        self.input_crc32 = joined_crc32(self.input_crc32, meta["input_crc32"])
        self.rows_per_file[file_index] += meta["num_rows"]
        self.symptoms.add(meta["signs"])
        self.num_missing += np.array(meta["num_missing"], np.int64)
        if meta["num_rows"]:
            self.sums += np.array(meta["sums"])
            low, high = np.array(meta["extremes"])
            self.extremes = np.stack([np.minimum(self.extremes[0], low), np.maximum(self.extremes[1], high)])

    def dense_stats(self, schema: Schema) -> dict[str, DenseStats]:
        """Statistics of each dense column for the manifest."""
        num_rows = sum(self.chunk_rows)
        mean = self.sums[0] / num_rows
        deviation = np.sqrt(np.maximum(self.sums[1] / num_rows - mean**2, 0))
        return {
            name: DenseStats(
                missing_rate=int(self.num_missing[i]) / num_rows,
                mean=float(mean[i]),
                standard_deviation=float(deviation[i]),
                minimum=float(self.extremes[0, i]),
                maximum=float(self.extremes[1, i]),
            )
            for i, name in enumerate(schema.dense_names)
        }


def parse_inputs(
    tasks: Iterator[ParseTask], parsed: Parsed, bad_rows: BadRows, pool: WorkPool, progress: Progress
) -> None:
    """Parse all blocks that are not staged yet, and count all of them.

    Raises:
        PreprocessError: an input cannot be read, or more rows are malformed than allowed.
    """
    places: list[tuple[str, int, int]] = []

    def noted() -> Iterator[ParseTask]:
        for task in tasks:
            places.append((task.path, task.block.file_index, task.block.num_bytes))
            yield task

    first_line, last_file = 0, -1
    for chunk, meta in enumerate(pool.map_ordered(parse_block, noted())):
        path, file_index, num_bytes = places[chunk]
        first_line, last_file = (first_line if file_index == last_file else 0), file_index
        for line, name, reason, raw in meta["bad_rows"]:
            bad_rows.add(BadRow(first_line + line, name, reason, bytes.fromhex(raw)), path)
        first_line += meta["num_lines"]
        parsed.add(file_index, meta)
        progress.advance(num_bytes)


def list_tasks(inputs: tuple[str, ...], source: str, schema: Schema, stage: Stage) -> Iterator[ParseTask]:
    """Yield the blocks of all inputs in order, without the bytes of those already staged."""
    chunk = 0
    for file_index, path in enumerate(inputs):
        for offset, num_bytes, data, header, crc32 in checksummed_blocks(path, source, schema):
            held = None if os.path.exists(stage.chunk_path(chunk)) else data
            block = InputBlock(chunk, file_index, offset, num_bytes, held, header, crc32)
            yield ParseTask(block, path, source, schema, stage)
            chunk += 1


def checksummed_blocks(
    path: str, source: str, schema: Schema
) -> Iterator[tuple[int, int, bytes | None, tuple[str, ...] | None, int | None]]:
    """Yield `blocks_of` an input with a checksum of what they come from: its text, or the whole of a Parquet file.

    (A batch decoded from Parquet need not have the same bytes twice: those under nulls are left as they come.)
    Raises as `blocks_of`.
    """
    is_parquet = source == "table" and delimiter_of(path) is None
    whole = input_crc32(path) if is_parquet else None
    for offset, num_bytes, data, header in blocks_of(path, source, schema):
        crc32 = whole if is_parquet or data is None else zlib.crc32(data)
        yield offset, num_bytes, data, header, crc32


def content_crc32(inputs: tuple[str, ...], source: str, schema: Schema, progress: Progress) -> int:
    """Return what `Parsed.input_crc32` would be, without parsing. Raises as `blocks_of`."""
    joined = 0
    for file_index, path in enumerate(inputs):
        for offset, num_bytes, _, _, crc32 in checksummed_blocks(path, source, schema):
            block = InputBlock(0, file_index, offset, num_bytes, crc32=crc32)
            joined = joined_crc32(joined, _crc32_of(block, path))
            progress.advance(num_bytes)
    return joined


def joined_crc32(joined: int, crc32: int) -> int:
    """Add one block's checksum to that of all blocks before it."""
    return zlib.crc32(crc32.to_bytes(4, "little"), joined)


def blocks_of(
    path: str, source: str, schema: Schema, *, needs_label: bool = True
) -> Iterator[tuple[int, int, bytes | None, tuple[str, ...] | None]]:
    """Yield (offset, length, bytes or None, header of a text table) of the blocks of an input file.

    Raises:
        PreprocessError: the file cannot be read, or lacks a column.
    """
    if source == "table" and delimiter_of(path) is None:
        for first_row, batch in read_parquet_batches(path, schema, needs_label=needs_label):
            yield first_row, len(batch), batch, None
        return
    header = None
    has_bags = any(column.multi_hot for column in schema.categorical)
    for offset, num_bytes, data in read_blocks(path, part=_PARTS_WITH_BAGS if has_bags else 1):
        if source == "table" and offset == 0:
            header = parse_header(_first_line(path, data), path, schema, needs_label=needs_label)
        yield offset, num_bytes, data, header


def _first_line(path: str, data: bytes | None) -> bytes:
    if data is not None:
        return data[: data.find(b"\n") + 1] or data
    with path_manager.open(path, "rb") as file:
        return bytes(file.readline())


def parse_block(task: ParseTask) -> dict[str, Any]:
    """Parse and stage one block, unless it is staged; return its counts.

    Raises:
        PreprocessError: it cannot be parsed, or is staged but the input is another one by now.
    """
    path = task.stage.chunk_path(task.block.index)
    if os.path.exists(path):
        return _staged(task, path)
    try:
        data = read_block(task.block, task.path)
        block = replace(task.block, data=data)
        chunk = parse_rows(block, task.path, task.source, task.schema)
    except PreprocessError as error:
        raise PreprocessError(f"{task.path}, near byte {task.block.offset}: {error}") from None
    meta = _meta_of(chunk) | {"input_crc32": _crc32_of(block, task.path)}
    write_arrays(path, _arrays_of(chunk), meta)
    return meta


def _staged(task: ParseTask, path: str) -> dict[str, Any]:
    with ArrayFile(path) as file:
        meta = dict(file.meta)
    if meta["input_crc32"] != _crc32_of(task.block, task.path):
        raise PreprocessError(
            f"input {task.path} is not the one that this work was begun with: its content differs near byte "
            f"{task.block.offset:,}. Put the first one back to continue, or delete {task.stage.folder} to start afresh "
            "with this one"
        )
    return meta


def _crc32_of(block: InputBlock, path: str) -> int:
    return zlib.crc32(read_block(block, path)) if block.crc32 is None else block.crc32


def parse_rows(block: InputBlock, path: str, source: str, schema: Schema) -> RawChunk:
    """Parse one block of a file.

    Raises:
        PreprocessError: a quoted field holds a line break, or the file changed.
    """
    if source == "criteo":
        return parse_criteo(load_block(block, path), schema)
    delimiter = delimiter_of(path)
    if delimiter is None:
        assert block.data is not None
        return parse_parquet_batch(block.data, schema)
    assert block.header is not None
    buffer = load_block(block, path)
    return parse_text_block(buffer, block.header, delimiter, schema, starts_file=block.offset == 0)


def _meta_of(chunk: RawChunk) -> dict[str, Any]:
    dense = chunk.dense.astype(np.float64)
    return {
        "num_rows": len(chunk.labels),
        "num_lines": chunk.num_lines,
        # "signs" is part of the staged file's format: renaming the key means a new STAGE_VERSION.
        "signs": symptoms_of(chunk),
        "num_missing": chunk.num_missing.tolist(),
        "sums": [dense.sum(axis=0).tolist(), np.square(dense).sum(axis=0).tolist()],
        "extremes": [dense.min(axis=0).tolist(), dense.max(axis=0).tolist()] if len(dense) else [],
        "bad_rows": [(row.line, row.field, row.reason, row.raw.hex()) for row in chunk.bad_rows],
    }


def _arrays_of(chunk: RawChunk) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {"labels": chunk.labels, "dense": chunk.dense.reshape(-1)}
    for c, column in enumerate(chunk.columns):
        if isinstance(column.keys, np.ndarray):
            arrays[f"keys_{c}"] = column.keys
        else:
            arrays[f"key_offsets_{c}"], arrays[f"key_bytes_{c}"] = binary_buffers(column.keys)
        arrays[f"counts_{c}"] = column.counts
        arrays[f"codes_{c}"] = column.codes
        if column.lengths is not None:
            arrays[f"lengths_{c}"] = column.lengths
    return arrays
