"""The gate: a package is written only if it ranks as well as the model that it came from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from papilio.data_pipeline.progress import Progress
from papilio.trainer.inference.backends.flat_model import FlatModel, build_flat_model
from papilio.trainer.inference.export.comparison import Comparison, compare_scores
from papilio.trainer.inference.export.export_options import SEARCHED_PRECISIONS
from papilio.trainer.inference.export.feasible_mix import Choices, Mix, export_options, find_feasible
from papilio.trainer.inference.export.held_out import Block, HeldOut
from papilio.trainer.inference.export.quality_report import (
    OptionFigures,
    QualityReport,
    SampleFigures,
    TableFigures,
    Thresholds,
    percent,
)
from papilio.trainer.inference.export.report_page import report_page
from papilio.trainer.inference.export.requantized import RequantizedTables, split_features
from papilio.trainer.inference.export.sensitivity import Sensitivity, is_stored_so
from papilio.trainer.inference.package.format import DENSE, PRECISIONS, Package, PackageError, QuantizerName, TableEntry
from papilio.trainer.inference.package.table_writer import TableChoice

logger = logging.getLogger(__name__)
NUM_NAMED_TABLES = 5


class GateError(PackageError):
    """The package does not keep the quality asked for; names the tables that cost most, and what would pass."""


@dataclass(frozen=True)
class GateResult:
    """What `check` found: `summary` goes into the manifest, `report` into report.json, `page` into report.html."""

    summary: dict[str, float]
    report: dict[str, Any]
    page: str


def check(reference: Package, package: Package, held_out: HeldOut, *, min_auc_ratio: float) -> GateResult:
    """Hold the package's predictions on held-out data against those of the model in fp32.

    Args:
        reference: the model with all tables in fp32; of an fp32 export it is the package itself.
        package: the package to be, complete but for its reports.
        held_out: the samples.
        min_auc_ratio: the package's AUC must be at least this share of the reference's; its NE at most as much above.

    Raises:
        GateError: it is not; nothing is to be written then.
        ComparisonError: the samples cannot tell two models apart.
        DatasetError: they cannot be read.
    """
    thresholds = Thresholds(min_auc_ratio=min_auc_ratio, max_ne_ratio=2 - min_auc_ratio)
    models = _Models(reference, package)
    comparison = models.compare(held_out)
    sensitivity = Sensitivity(reference, held_out, package)
    options = sensitivity.measure_all(candidates(package.manifest.tables))
    report = _report(package, held_out, thresholds, comparison, sensitivity, options)
    if report.failures:
        raise GateError(_refusal(report, _passing(report, models, held_out, sensitivity, options)))
    _log_passed(report)
    return GateResult(_summary(report), report.model_dump(mode="json"), report_page(report))


def candidates(tables: Sequence[TableEntry]) -> dict[str, list[TableChoice]]:
    """Return what each table is measured at: as it is packaged, and all other precisions."""
    used = (table.quantizer for table in tables if table.precision in SEARCHED_PRECISIONS and table.quantizer)
    quantizer: QuantizerName = next(used, "least_squares")
    found = {}
    for table in tables:
        packaged = TableChoice(table.precision, table.quantizer or quantizer)
        others = [TableChoice(precision, quantizer) for precision in PRECISIONS if precision != table.precision]
        found[table.name] = [packaged, *others]
    return found


class _Models:
    """The model in fp32 and the package, to be scored on the same samples."""

    def __init__(self, reference: Package, package: Package) -> None:
        self._reference, self._package = build_flat_model(reference), build_flat_model(package)
        self.tables = package.manifest.tables
        self._requantized = RequantizedTables(reference)

    def compare(self, held_out: HeldOut, changed: Choices | None = None) -> Comparison:
        """Compare the package, with some tables stored otherwise, with the model in fp32."""
        logits: list[list[NDArray[np.float32]]] = [[], []]
        labels = []
        for block in _shown(held_out):
            pooled = self._package.pool(block.ids, block.lengths)
            self._change(pooled, block, changed or {})
            logits[0].append(_score(self._reference, block, self._reference.pool(block.ids, block.lengths)))
            logits[1].append(_score(self._package, block, pooled))
            labels.append(block.labels)
        return compare_scores(np.concatenate(logits[0]), np.concatenate(logits[1]), np.concatenate(labels))

    def _change(self, pooled: torch.Tensor, block: Block, changed: Choices) -> None:
        bags = split_features(block.ids.numpy(), block.lengths.numpy(), len(self.tables)) if changed else []
        for number, table in enumerate(self.tables):
            choice = changed.get(table.name)
            if choice is not None and not is_stored_so(table, choice):
                pooled[:, number] = self._requantized.pool(number, *bags[number], choice)


def _shown(held_out: HeldOut) -> Iterator[Block]:
    """The samples, with a progress bar."""
    with Progress("certifying", held_out.num_samples, "samples", is_shown=True, is_kept=False) as progress:
        for block in held_out.blocks():
            yield block
            progress.advance(len(block.labels))


def _score(model: FlatModel, block: Block, pooled: torch.Tensor) -> NDArray[np.float32]:
    return model.score(block.dense, pooled).numpy()


def _report(
    package: Package,
    held_out: HeldOut,
    thresholds: Thresholds,
    comparison: Comparison,
    sensitivity: Sensitivity,
    options: Mapping[str, tuple[OptionFigures, ...]],
) -> QualityReport:
    manifest = package.manifest
    return QualityReport(
        papilio_version=manifest.papilio_version,
        name=manifest.name,
        architecture=manifest.architecture,
        checkpoint=manifest.source.checkpoint,
        step=manifest.source.step,
        made_at=manifest.made_at,
        label=held_out.dataset.schema.label,
        thresholds=thresholds,
        held_out=SampleFigures(
            data=held_out.dataset.folder,
            split=held_out.split,
            num_samples=comparison.num_samples,
            num_rows=held_out.num_rows,
        ),
        comparison=comparison,
        table_sample=sensitivity.figures,
        table_bytes=sum(table.num_bytes for table in manifest.tables),
        fp32_table_bytes=sum(table.fp32_bytes for table in manifest.tables),
        dense_bytes=manifest.files[DENSE].num_bytes,
        tables=tuple(_table_figures(table, options[table.name]) for table in manifest.tables),
    )


def _table_figures(table: TableEntry, options: tuple[OptionFigures, ...]) -> TableFigures:
    return TableFigures(
        name=table.name,
        feature=table.feature,
        rows=table.rows,
        dim=table.dim,
        precision=table.precision,
        quantizer=table.quantizer,
        num_bytes=table.num_bytes,
        fp32_bytes=table.fp32_bytes,
        row_error=table.row_error.mean_relative,
        options=options,
    )


def _passing(
    report: QualityReport,
    models: _Models,
    held_out: HeldOut,
    sensitivity: Sensitivity,
    options: Mapping[str, tuple[OptionFigures, ...]],
) -> Mix | None:
    def screen(mix: Choices) -> bool:
        return not report.thresholds.failures(sensitivity.compare(mix))

    def confirm(mix: Choices) -> Comparison | None:
        comparison = models.compare(held_out, mix)
        return None if report.thresholds.failures(comparison) else comparison

    return find_feasible(models.tables, options, screen=screen, confirm=confirm)


def _refusal(report: QualityReport, mix: Mix | None) -> str:
    lines = ["the package is not written:", *(f"  {failure}" for failure in report.failures)]
    if report.is_within_noise:
        lines.append(
            "  the 95 % intervals reach the thresholds: on other samples it might have passed; more would tell"
        )
    total = sum(table.expected_increase for table in report.tables)
    if total > 0:
        lines += _costly_tables(report, total)
    lines.append(_way_out(report, mix))
    return "\n".join(lines)


def _costly_tables(report: QualityReport, total: float) -> list[str]:
    sample = report.table_sample
    lines = [f"the tables that cost most, each alone, on {sample.num_samples:,} samples of split {sample.split}:"]
    for table in sorted(report.tables, key=lambda table: -table.expected_increase)[:NUM_NAMED_TABLES]:
        if table.expected_increase > 0 and table.chosen is not None:
            lines.append(
                f"  {table.name} in {table.precision}: {table.expected_increase:.2e} nats of log loss a sample "
                f"({percent(table.expected_increase / total, 0)} of all tables'), AUC {table.chosen.auc_change:+.6f}"
            )
    return lines


def _way_out(report: QualityReport, mix: Mix | None) -> str:
    if mix is None:
        return (
            "no precision of tables would pass: with all of them in fp32 the package still falls short, so its dense "
            "part is not the trained one; export again, and report this if it stays"
        )
    comparison, share = mix.comparison, mix.num_bytes / report.fp32_table_bytes
    refused_share = report.table_bytes / report.fp32_table_bytes
    return (
        f"what would pass, measured on the same {comparison.num_samples:,} samples: AUC "
        f"{percent(comparison.auc_ratio.value)} and NE {percent(comparison.ne_ratio.value)} of fp32's, tables at "
        f"{percent(share, 2)} of their fp32 size in place of {percent(refused_share, 2)}:\n"
        f"  {export_options(mix.choices, share)}"
    )


def _summary(report: QualityReport) -> dict[str, float]:
    comparison = report.comparison
    return {
        "auc": comparison.candidate.auc,
        "fp32_auc": comparison.reference.auc,
        "auc_ratio": comparison.auc_ratio.value,
        "min_auc_ratio": report.thresholds.min_auc_ratio,
        "ne": comparison.candidate.ne,
        "fp32_ne": comparison.reference.ne,
        "ne_ratio": comparison.ne_ratio.value,
        "num_samples": comparison.num_samples,
    }


def _log_passed(report: QualityReport) -> None:
    comparison = report.comparison
    logger.info(
        "certified on %s samples of split %s: AUC %.6f (%.4f %% of fp32's), NE %.6f (%.4f %%)",
        f"{comparison.num_samples:,}",
        report.held_out.split,
        comparison.candidate.auc,
        comparison.auc_ratio.value * 100,
        comparison.candidate.ne,
        comparison.ne_ratio.value * 100,
    )
    if report.is_within_noise:
        logger.warning(
            "the 95 % interval of the AUC or of the NE reaches beyond the threshold: on other samples this package "
            "could have been refused; certify on more"
        )
