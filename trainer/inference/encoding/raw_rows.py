"""Raw files, as `papilio preprocess` takes them, encoded for a package a block at a time. Labels may be absent.

N sound rows of a block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from papilio.data_pipeline.preprocess.bad_rows import BadRow, PreprocessError
from papilio.data_pipeline.preprocess.byte_blocks import PADDING_BYTES, InputBlock, load_block
from papilio.data_pipeline.preprocess.criteo import NUM_FIELDS, parse_criteo
from papilio.data_pipeline.preprocess.parse_stage import blocks_of, parse_rows
from papilio.data_pipeline.preprocess.raw_chunk import RawChunk
from papilio.data_pipeline.schema import Schema
from papilio.trainer.inference.encoding.request_encoder import EncodedBatch, RequestEncoder

# Of a Criteo file without labels, as Kaggle's test.txt.
_NO_LABEL = b"0\t"
_LINE_START = re.compile(rb"^(?=[^\r\n])", re.MULTILINE)


@dataclass(frozen=True)
class RawRows:
    """A block of one file.

    Attributes:
        batch: its sound rows, encoded.
        lines: [N] their lines in the file, from 1; in Parquet, their rows, from 1.
        labels: [N] their labels, None where the file has none.
        bad_rows: the others, by line in the file.
        num_bytes: of the block.
    """

    batch: EncodedBatch
    lines: NDArray[np.int64]
    labels: NDArray[np.uint8] | None
    bad_rows: tuple[BadRow, ...]
    num_bytes: int


def read_raw_rows(path: str, source: str, encoder: RequestEncoder) -> Iterator[RawRows]:
    """Yield the blocks of a file, in order.

    Raises:
        PreprocessError: the file cannot be read, lacks a column, or is malformed beyond single rows.
    """
    schema = encoder.raw_schema
    first_line = 0
    has_label: bool | None = None
    for offset, num_bytes, data, header in blocks_of(path, source, schema, needs_label=False):
        block = InputBlock(0, 0, offset, num_bytes, data, header)
        if has_label is None:
            has_label = _has_label(block, path, source, schema)
        try:
            chunk = _parse(block, path, source, schema, has_label=has_label)
        except PreprocessError as error:
            raise PreprocessError(f"{path}, near byte {offset}: {error}") from None
        lines = chunk.line_numbers + first_line
        bad_rows = tuple(BadRow(row.line + first_line, row.field, row.reason, row.raw) for row in chunk.bad_rows)
        yield RawRows(encoder.encode_chunk(chunk), lines, chunk.labels if has_label else None, bad_rows, num_bytes)
        first_line += chunk.num_lines


def _parse(block: InputBlock, path: str, source: str, schema: Schema, *, has_label: bool) -> RawChunk:
    if has_label or source != "criteo":
        return parse_rows(block, path, source, schema)
    text = load_block(block, path)[PADDING_BYTES:].tobytes()
    with_labels = _LINE_START.sub(_NO_LABEL, text)  # blank lines stay: they are no rows
    padded = np.zeros(PADDING_BYTES + len(with_labels), np.uint8)
    padded[PADDING_BYTES:] = np.frombuffer(with_labels, np.uint8)
    return parse_criteo(padded, schema)


def _has_label(block: InputBlock, path: str, source: str, schema: Schema) -> bool:
    if source == "criteo":
        text = load_block(block, path)[PADDING_BYTES:]
        first_end = int(np.argmax(text == ord("\n")))
        return int(np.count_nonzero(text[:first_end] == ord("\t"))) != NUM_FIELDS - 2
    if block.header is not None:
        return schema.label in block.header
    return schema.label in pa.ipc.open_stream(block.data).schema.names
