"""Pooled rows as they would be were a table stored otherwise: only rows that are looked up are quantized, in memory."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from papilio.trainer.inference.package.format import TABLES, Package
from papilio.trainer.inference.package.quantizers import dequantize_rows, quantize_rows
from papilio.trainer.inference.package.table_writer import TableChoice

Ids = NDArray[np.int32]


class RequantizedTables:
    """The tables of a package in fp32, to be pooled at any other precision."""

    def __init__(self, reference: Package) -> None:
        """Map the tables of `reference`, which are all in fp32."""
        self._tables = reference.manifest.tables
        self._values = np.memmap(reference.path(TABLES), np.uint8, "r")

    def pool(self, number: int, ids: Ids, lengths: Ids, choice: TableChoice) -> torch.Tensor:
        """Return pooled rows [B, D] of a table.

        Args:
            number: of the table.
            ids: [V] of its feature alone; one out of range is row 0, the unknown one.
            lengths: [B].
            choice: how the table would be stored.
        """
        table = self._tables[number]
        if not len(ids):
            return torch.zeros(len(lengths), table.dim)
        known = np.where((ids < 0) | (ids >= table.rows), 0, ids)
        rows, places = np.unique(known, return_inverse=True)
        stored = quantize_rows(self._rows(number, rows), choice.precision, choice.quantizer)
        values = dequantize_rows(stored, choice.precision, table.dim)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        return torch.nn.functional.embedding_bag(
            torch.from_numpy(places.astype(np.int64)), values, torch.from_numpy(starts), mode=table.pooling
        )

    def _rows(self, number: int, rows: NDArray[np.int32]) -> torch.Tensor:
        table = self._tables[number]
        raw = self._values[table.offset : table.offset + table.num_bytes]
        return torch.from_numpy(raw.view(np.float32).reshape(table.rows, table.dim)[rows])


def split_features(ids: Ids, lengths: Ids, num_features: int) -> list[tuple[Ids, Ids]]:
    """Return ids [V] and lengths [B] of each feature, from those of all features one after the other."""
    lengths_FB = lengths.reshape(num_features, -1)
    ends = np.cumsum(lengths_FB.sum(axis=1))
    return list(zip(np.split(ids, ends[:-1]), lengths_FB, strict=True))
