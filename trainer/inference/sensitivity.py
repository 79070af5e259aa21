"""What the precision of single tables costs, measured on a sample whose pooled rows are kept in memory.

Quantizing is a matter of single rows, so only those that the sample looks up are quantized, and no package is written:
a table at another precision is one new slice of the pooled rows [N, F, D], through the dense part of the model again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.inference.comparison import Comparison, compare_scores, expected_loss_increases, sample_losses
from trainer.inference.flat_model import build_flat_model
from trainer.inference.held_out import BLOCK_ROWS, HeldOut
from trainer.inference.package import TABLES, Package, TableEntry, row_bytes
from trainer.inference.quantizers import dequantize_rows, quantize_rows
from trainer.inference.report import OptionFigures, SampleFigures
from trainer.inference.table_writer import TableChoice

MAX_SAMPLES = 8 * BLOCK_ROWS
# Of the sample's pooled rows and of one table's rows: the sample shrinks where models are large.
MAX_POOLED_BYTES = 256 << 20


@dataclass(frozen=True)
class _Bags:
    """One table's part of the sample: its distinct rows, and the bags as places among these."""

    rows: NDArray[np.int64]
    places: torch.Tensor
    offsets: torch.Tensor


class Sensitivity:
    """A sample of held-out data, scored by a model in fp32, and again with some of its tables in other precisions."""

    def __init__(self, reference: Package, held_out: HeldOut) -> None:
        """Score the sample in fp32.

        Args:
            reference: a package with all tables in fp32.
            held_out: where the sample is taken from, evenly.

        Raises:
            DatasetError: the data set cannot be read.
        """
        self.tables = reference.manifest.tables
        bytes_per_sample = len(self.tables) * self.tables[0].dim * 4
        room = max(BLOCK_ROWS, MAX_POOLED_BYTES // bytes_per_sample // BLOCK_ROWS * BLOCK_ROWS)
        most = min(MAX_SAMPLES, room, held_out.max_samples or MAX_SAMPLES)
        self._sample = HeldOut(held_out.dataset, held_out.split, most)
        self._values = np.memmap(reference.path(TABLES), np.uint8, "r")
        self._model = build_flat_model(reference)
        self._read_sample()
        self._numbers = {table.name: number for number, table in enumerate(self.tables)}

    @property
    def figures(self) -> SampleFigures:
        """What the sample is."""
        return SampleFigures(
            data=self._sample.dataset.folder,
            split=self._sample.split,
            num_samples=len(self.labels),
            num_rows=self._sample.num_rows,
        )

    def measure(self, table: str, choice: TableChoice) -> OptionFigures:
        """Measure one table at a precision, all others in fp32."""
        logits = self.logits({table: choice})
        entry = self.tables[self._numbers[table]]
        increases = sample_losses(logits, self.labels) - self._reference_losses
        return OptionFigures(
            precision=choice.precision,
            quantizer=choice.used_quantizer,
            num_bytes=entry.rows * row_bytes(choice.precision, entry.dim),
            expected_increase=float(expected_loss_increases(self.reference_logits, logits).mean()),
            measured_increase=float(increases.mean()),
            measured_error=float(increases.std() / np.sqrt(len(increases))),
        )

    def measure_all(self, choices: Mapping[str, Sequence[TableChoice]]) -> dict[str, tuple[OptionFigures, ...]]:
        """Measure several precisions of each table."""
        return {table: tuple(self.measure(table, choice) for choice in found) for table, found in choices.items()}

    def compare(self, choices: Mapping[str, TableChoice]) -> Comparison:
        """Compare the model whose tables are stored so (fp32 where none is given) with the fp32 model.

        Raises:
            ComparisonError: the sample cannot tell two models apart.
        """
        return compare_scores(self.reference_logits, self.logits(choices), self.labels)

    def logits(self, choices: Mapping[str, TableChoice]) -> NDArray[np.float32]:
        """Return logits [N] of the sample with these tables in other precisions."""
        changed = {self._numbers[name]: self._pool(self._numbers[name], choice) for name, choice in choices.items()}
        pooled_NFD = self._pooled_NFD
        logits = np.empty(len(self.labels), np.float32)
        for start in range(0, len(logits), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            pooled = pooled_NFD[block].clone()
            for number, values_ND in changed.items():
                pooled[:, number] = values_ND[block]
            logits[block] = self._model.score(self._dense_NI[block], pooled).numpy()
        return logits

    def _read_sample(self) -> None:
        blocks = list(self._sample.blocks())
        self._dense_NI = torch.cat([block.dense for block in blocks])
        self.labels = np.concatenate([block.labels for block in blocks]) > 0
        pooled = [self._model.pool(block.ids, block.lengths) for block in blocks]
        self._pooled_NFD = torch.cat(pooled)
        scores = [self._model.score(block.dense, rows) for block, rows in zip(blocks, pooled, strict=True)]
        self.reference_logits = torch.cat(scores).numpy()
        self._reference_losses = sample_losses(self.reference_logits, self.labels)
        self._bags = self._split_bags([(block.ids.numpy(), block.lengths.numpy()) for block in blocks])

    def _split_bags(self, blocks: list[tuple[NDArray[np.int32], NDArray[np.int32]]]) -> list[_Bags]:
        num_features = len(self.tables)
        ids: list[list[NDArray[np.int32]]] = [[] for _ in range(num_features)]
        lengths: list[list[NDArray[np.int32]]] = [[] for _ in range(num_features)]
        for block_ids, block_lengths in blocks:
            lengths_FB = block_lengths.reshape(num_features, -1)
            ends = np.cumsum(lengths_FB.sum(axis=1))
            for feature, of_feature in enumerate(np.split(block_ids, ends[:-1])):
                ids[feature].append(of_feature)
                lengths[feature].append(lengths_FB[feature])
        return [
            _bags(table, np.concatenate(ids[feature]), np.concatenate(lengths[feature]))
            for feature, table in enumerate(self.tables)
        ]

    def _pool(self, number: int, choice: TableChoice) -> torch.Tensor:
        """Return the pooled rows [N, D] of one table at a precision."""
        table, bags = self.tables[number], self._bags[number]
        if not len(bags.rows):
            return torch.zeros(len(self.labels), table.dim)
        stored = quantize_rows(self._rows(table, bags.rows), choice.precision, choice.quantizer)
        values = dequantize_rows(stored, choice.precision, table.dim)
        return torch.nn.functional.embedding_bag(bags.places, values, bags.offsets, mode=table.pooling)

    def _rows(self, table: TableEntry, rows: NDArray[np.int64]) -> torch.Tensor:
        raw = self._values[table.offset : table.offset + table.num_bytes]
        return torch.from_numpy(raw.view(np.float32).reshape(table.rows, table.dim)[rows])


def _bags(table: TableEntry, ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> _Bags:
    known = np.where((ids < 0) | (ids >= table.rows), 0, ids)
    rows, places = np.unique(known, return_inverse=True)
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return _Bags(rows.astype(np.int64), torch.from_numpy(places), torch.from_numpy(offsets))
