"""Writes `tables.bin`: rows are read, quantized and written some at a time, and their error measured on the way."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch

from papilio.trainer.inference.export.export_options import SEARCHED_PRECISIONS
from papilio.trainer.inference.export.trained_model import Floats, TrainedModel, TrainedTable
from papilio.trainer.inference.package.format import (
    TABLE_ALIGNMENT,
    FileEntry,
    PackageError,
    Precision,
    QuantizerName,
    RowError,
    TableEntry,
    row_bytes,
    table_offsets,
)
from papilio.trainer.inference.package.quantizers import (
    dequantize_rows,
    quantize_rows,
    smallest_fine_span,
)

# Quantized and measured at once: little memory, and enough for some threads.
CHUNK_VALUES = 1 << 19


@dataclass(frozen=True)
class TableChoice:
    """How a table is stored; `quantizer` is for int4 and int2."""

    precision: Precision
    quantizer: QuantizerName = "least_squares"

    @property
    def used_quantizer(self) -> QuantizerName | None:
        """The quantizer that its rows pass through."""
        if self.precision in SEARCHED_PRECISIONS:
            return self.quantizer
        return "minmax" if self.precision == "int8" else None

    @property
    def key(self) -> tuple[Precision, QuantizerName | None]:
        """What is stored: choices of the same key give the same rows."""
        return self.precision, self.used_quantizer

    def num_bytes(self, rows: int, dim: int) -> int:
        """Bytes of a table of `rows` rows of `dim` values."""
        return rows * row_bytes(self.precision, dim)


@dataclass
class _Tally:
    """Sums over the rows of a table, from which its `RowError` comes."""

    num_rows: int = 0
    num_values: int = 0
    relative: float = 0.0
    max_relative: float = 0.0
    squares: float = 0.0
    max_absolute: float = 0.0
    num_coarse: int = 0
    is_finite: bool = True

    def add(self, values: torch.Tensor, rows: torch.Tensor, precision: Precision) -> None:
        """Count some rows [n, D] and what they are stored as."""
        lowest, highest = values.amin(1), values.amax(1)
        self.is_finite &= bool((torch.isfinite(lowest) & torch.isfinite(highest)).all())
        self.num_rows += len(values)
        self.num_values += values.numel()
        if precision == "fp32":
            return
        difference = dequantize_rows(rows, precision, values.shape[1]).sub_(values)
        errors, lengths = (torch.linalg.vector_norm(part, dim=1).double() for part in (difference, values))
        relative = torch.where(errors > 0, errors / lengths, 0)
        self.relative += float(relative.sum())
        self.max_relative = max(self.max_relative, float(relative.max()))
        self.squares += float(errors.square().sum())
        self.max_absolute = max(self.max_absolute, float(difference.abs_().max()))
        if precision != "fp16":
            spans = highest - lowest
            self.num_coarse += int(((spans > 0) & (spans < smallest_fine_span(precision))).sum())

    def row_error(self) -> RowError:
        """Return the figures."""
        return RowError(
            mean_relative=self.relative / self.num_rows,
            max_relative=self.max_relative,
            rms=math.sqrt(self.squares / self.num_values),
            max_absolute=self.max_absolute,
            num_coarse_rows=self.num_coarse,
        )


def write_tables(
    model: TrainedModel,
    choices: Mapping[str, TableChoice],
    path: str,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> tuple[list[TableEntry], FileEntry]:
    """Write all tables of a model to a new file, in the model's order.

    Args:
        model: where the rows come from.
        choices: by table.
        path: the file.
        on_bytes: hears of each piece that was read, in bytes of fp32 values.

    Returns:
        The tables' entries for the manifest, and the file's.

    Raises:
        PackageError: values that a precision cannot hold, or that are not finite.
        DamagedError: a block of the checkpoint is missing or damaged.
    """
    tables = list(model.tables.values())
    sizes = [table.rows * row_bytes(choices[table.name].precision, table.dim) for table in tables]
    entries = []
    with open(path, "xb") as file:
        writer = _Writer(file)
        for table, offset in zip(tables, table_offsets(sizes), strict=False):
            writer.pad_to(offset)
            entries.append(_write_table(model, table, choices[table.name], writer, on_bytes))
        file.flush()
        os.fsync(file.fileno())
    return entries, FileEntry(num_bytes=writer.num_bytes, crc32=writer.crc32)


class _Writer:
    """A file with what was written to it: bytes and checksum."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.num_bytes = 0
        self.crc32 = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.num_bytes += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)

    def pad_to(self, offset: int) -> None:
        assert 0 <= offset - self.num_bytes < TABLE_ALIGNMENT
        self.write(bytes(offset - self.num_bytes))


def _write_table(
    model: TrainedModel, table: TrainedTable, choice: TableChoice, writer: _Writer, on_bytes: Callable[[int], None]
) -> TableEntry:
    offset, tally = writer.num_bytes, _Tally()
    for values in _chunks(model.stream(table.name), max(1, CHUNK_VALUES // table.dim)):
        rows = quantize_rows(values, choice.precision, choice.quantizer)
        tally.add(values, rows, choice.precision)
        writer.write(rows.numpy().data.cast("B"))
        on_bytes(values.numel() * 4)
    error = tally.row_error()
    if not (tally.is_finite and math.isfinite(error.rms)):
        raise PackageError(_why_not_finite(table.name, choice.precision, is_finite=tally.is_finite))
    return TableEntry(
        name=table.name,
        feature=table.feature,
        rows=table.rows,
        dim=table.dim,
        pooling=table.pooling,
        precision=choice.precision,
        quantizer=choice.used_quantizer,
        offset=offset,
        row_bytes=row_bytes(choice.precision, table.dim),
        row_error=error,
    )


def _chunks(pieces: Iterable[Floats], num_rows: int) -> Iterator[torch.Tensor]:
    """Yield rows, `num_rows` at a time, however they come: sums over them are then the same to the last bit."""
    kept: list[Floats] = []
    for piece in pieces:
        while len(piece):
            kept.append(piece[: num_rows - sum(map(len, kept))])
            piece = piece[len(kept[-1]) :]  # noqa: PLW2901  # what is left of it
            if sum(map(len, kept)) == num_rows:
                yield torch.from_numpy(np.concatenate(kept))
                kept = []
    if kept:
        yield torch.from_numpy(np.concatenate(kept))


def _why_not_finite(table: str, precision: Precision, *, is_finite: bool) -> str:
    if not is_finite:
        return (
            f"table {table} holds NaN or infinity, so the model gives no probabilities; export an earlier checkpoint "
            "(--checkpoint; `papilio checkpoint list RUN` lists them), or train with a lower learning rate"
        )
    what = "its values" if precision == "fp16" else "the scale or bias of a row"
    return (
        f"table {table} holds values that {precision} cannot: {what} would be beyond fp16's largest, 65,504; use "
        f"--table {table}=fp32"
    )
