"""What the precision of single tables costs, measured on a sample whose pooled rows are kept in memory.

No package is written for it: a table at another precision is one new slice of the pooled rows [N, F, D], through the
dense part of the model again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from papilio.data_pipeline.progress import Progress
from papilio.trainer.inference.backends.flat_model import FlatModel, build_flat_model
from papilio.trainer.inference.export.comparison import (
    Comparison,
    check_samples,
    compare_scores,
    exact_auc,
    expected_loss_increases,
    sample_losses,
)
from papilio.trainer.inference.export.held_out import BLOCK_ROWS, HeldOut
from papilio.trainer.inference.export.quality_report import OptionFigures, SampleFigures
from papilio.trainer.inference.export.requantized import Ids, RequantizedTables, split_features
from papilio.trainer.inference.package.format import DENSE, PRECISIONS, Package, TableEntry, row_bytes
from papilio.trainer.inference.package.table_writer import TableChoice

Logits = NDArray[np.float32]
MAX_SAMPLES = 4 * BLOCK_ROWS
# Of pooled rows. The sample shrinks where models are wide, and where their dense part is large: all tables at all
# precisions then take some 20 s on a core, or as long as the smallest sample does.
MAX_POOLED_BYTES = 256 << 20
MAX_SWEEP_FLOPS = 2e12


class Sensitivity:
    """A sample of held-out data, scored by a model in fp32, and again with some of its tables in other precisions."""

    def __init__(self, reference: Package, held_out: HeldOut, package: Package | None = None) -> None:
        """Score the sample in fp32.

        Args:
            reference: a package with all tables in fp32.
            held_out: where the sample is taken from, evenly.
            package: the same model with other precisions. Where a table is asked for as it is stored there, its bytes
                are measured, and not what quantizing it again would give.

        Raises:
            DatasetError: the data set cannot be read.
            ComparisonError: the sample cannot tell two models apart.
        """
        self.tables = reference.manifest.tables
        self._numbers = {table.name: number for number, table in enumerate(self.tables)}
        most = min(sample_size(reference), held_out.max_samples or MAX_SAMPLES)
        self._sample = HeldOut(held_out.dataset, held_out.split, most)
        self._requantized = RequantizedTables(reference)
        self._stored = package.manifest.tables if package is not None else ()
        self._model = build_flat_model(reference)
        self._read_sample(build_flat_model(package) if package is not None else None)

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
        entry = self.tables[self._numbers[table]]
        logits = self.logits({table: choice})
        increases = sample_losses(logits, self.labels) - self._reference_losses
        return OptionFigures(
            precision=choice.precision,
            quantizer=choice.used_quantizer,
            num_bytes=entry.rows * row_bytes(choice.precision, entry.dim),
            expected_increase=float(expected_loss_increases(self.reference_logits, logits).mean()),
            measured_increase=float(increases.mean()),
            measured_error=float(increases.std() / np.sqrt(len(increases))),
            auc_change=exact_auc(logits, self.labels) - self._reference_auc,
        )

    def measure_all(self, choices: Mapping[str, Sequence[TableChoice]]) -> dict[str, tuple[OptionFigures, ...]]:
        """Measure several precisions of each table."""
        total = sum(map(len, choices.values()))
        with Progress("measuring tables", total, "precisions", is_shown=True, is_kept=False) as progress:
            figures: dict[str, tuple[OptionFigures, ...]] = {}
            for table, found in choices.items():
                figures[table] = tuple(self.measure(table, choice) for choice in found)
                progress.advance(len(found))
        return figures

    def compare(self, choices: Mapping[str, TableChoice]) -> Comparison:
        """Compare the model whose tables are stored so (fp32 where none is given) with the fp32 model."""
        return compare_scores(self.reference_logits, self.logits(choices), self.labels)

    def expected_increase(self, choices: Mapping[str, TableChoice]) -> float:
        """Return how much the log loss grows with these tables, were the fp32 model's probabilities the true ones."""
        return float(expected_loss_increases(self.reference_logits, self.logits(choices)).mean())

    def logits(self, choices: Mapping[str, TableChoice]) -> Logits:
        """Return logits [N] of the sample with these tables in other precisions."""
        pools = {self._numbers[name]: self._pool(self._numbers[name], choice) for name, choice in choices.items()}
        changed = {number: values_ND for number, values_ND in pools.items() if values_ND is not None}
        if not changed:
            return self.reference_logits
        return self._score(self._pooled_NFD, changed)

    def _score(self, pooled_NFD: torch.Tensor, changed: Mapping[int, torch.Tensor] | None = None) -> Logits:
        logits = np.empty(len(self.labels), np.float32)
        for start in range(0, len(logits), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            pooled = pooled_NFD[block].clone()
            for number, values_ND in (changed or {}).items():
                pooled[:, number] = values_ND[block]
            logits[block] = self._model.score(self._dense_NI[block], pooled).numpy()
        return logits

    def _read_sample(self, stored: FlatModel | None) -> None:
        blocks = list(self._sample.blocks())
        self._dense_NI = torch.cat([block.dense for block in blocks])
        self.labels = np.concatenate([block.labels for block in blocks]) > 0
        self._pooled_NFD = torch.cat([self._model.pool(block.ids, block.lengths) for block in blocks])
        self._stored_NFD = torch.cat([stored.pool(block.ids, block.lengths) for block in blocks]) if stored else None
        self.reference_logits = self._score(self._pooled_NFD)
        check_samples(self.reference_logits, self.reference_logits, self.labels)
        self._reference_losses = sample_losses(self.reference_logits, self.labels)
        self._reference_auc = exact_auc(self.reference_logits, self.labels)
        parts = [split_features(block.ids.numpy(), block.lengths.numpy(), len(self.tables)) for block in blocks]
        self._bags = [_joined([part[number] for part in parts]) for number in range(len(self.tables))]

    def _pool(self, number: int, choice: TableChoice) -> torch.Tensor | None:
        """Return the pooled rows [N, D] of one table at a precision; None if they are those of the fp32 model."""
        if self._stored_NFD is not None and is_stored_so(self._stored[number], choice):
            return self._stored_NFD[:, number]
        if choice.precision == "fp32":
            return None
        return self._requantized.pool(number, *self._bags[number], choice)


def sample_size(package: Package) -> int:
    """Return how many samples the tables of a model are measured on, a multiple of a block."""
    manifest = package.manifest
    num_tables, dim = len(manifest.tables), manifest.tables[0].dim
    # A multiplication and an addition for each weight.
    flops = 2 * manifest.files[DENSE].num_bytes / 4 * num_tables * len(PRECISIONS)
    # Twice: of the model in fp32, and as it is packaged.
    room = min(MAX_SWEEP_FLOPS / flops, MAX_POOLED_BYTES / (2 * num_tables * dim * 4))
    return min(MAX_SAMPLES, max(BLOCK_ROWS, int(room) // BLOCK_ROWS * BLOCK_ROWS))


def is_stored_so(table: TableEntry, choice: TableChoice) -> bool:
    """Say whether a table is stored by this choice."""
    return (table.precision, table.quantizer) == (choice.precision, choice.used_quantizer)


def _joined(parts: Sequence[tuple[Ids, Ids]]) -> tuple[Ids, Ids]:
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([lengths for _, lengths in parts])
