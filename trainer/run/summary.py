"""What a person reads when a run is over."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from papilio.data_pipeline.manifest import Manifest
from papilio.trainer.metrics import MetricValues
from papilio.trainer.run.measurement import Comparison

WIDTH = 78
MIB = 1 << 20


@dataclass(frozen=True)
class Summary:
    """Figures of a finished run; `final` has metrics by split."""

    run_dir: str
    world_size: int
    device: str
    num_parameters: int
    num_steps: int
    num_samples: int
    train_s: float
    samples_per_s: float
    data_wait_share: float
    final: dict[str, MetricValues]
    best_validation_auc: float | None
    best_validation_step: int | None
    findings: tuple[str, ...]
    comparison: Comparison | None = None
    checkpoint_stalls_s: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        values = {key: value for key, value in self.__dict__.items() if key not in ("final", "comparison")}
        comparison = self.comparison.to_dict() if self.comparison is not None else None
        final = {split: found.to_dict() for split, found in self.final.items()}
        return {**values, "final": final, "comparison": comparison}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Summary:
        """Rebuild it from what summary.json holds."""
        names = {field.name for field in fields(cls)}
        values = {name: tree[name] for name in names & tree.keys()}
        found = tree.get("comparison")
        errors = {"step_error", "memory_error"}  # which follow from the others
        comparison = None if found is None else Comparison(**{k: v for k, v in found.items() if k not in errors})
        final = {split: MetricValues.from_dict(found) for split, found in tree["final"].items()}
        return cls(
            **{
                **values,
                "final": final,
                "comparison": comparison,
                "findings": tuple(tree["findings"]),
                "checkpoint_stalls_s": tuple(tree.get("checkpoint_stalls_s", ())),
            }
        )


def format_summary(summary: Summary, manifest: Manifest) -> str:
    """Lay the summary out for a terminal."""
    lines = [
        "─" * WIDTH,
        f" trained    {summary.num_samples:,} samples in {summary.num_steps:,} steps, {summary.train_s:.1f} s, on "
        f"{summary.world_size} rank(s), {summary.device}",
        f" speed      {summary.samples_per_s:,.0f} samples/s; {summary.data_wait_share:.2%} of the step spent waiting "
        "for data",
        f" model      {summary.num_parameters:,} weights",
        *_comparison_lines(summary.comparison),
        *_checkpoint_lines(summary.checkpoint_stalls_s),
        "",
        *(_metric_lines(summary.final, manifest) if summary.final else [" not measured: no held-out rows"]),
        "",
        *_best_lines(summary),
        f" run folder {summary.run_dir}",
        *(_wrap(finding) for finding in summary.findings),
        "─" * WIDTH,
    ]
    return "\n".join(lines)


def _best_lines(summary: Summary) -> Sequence[str]:
    if summary.best_validation_auc is None or summary.best_validation_step is None:
        return []
    return [
        f" best       validation AUC {summary.best_validation_auc:.4f}, after step {summary.best_validation_step:,}"
    ]


def _comparison_lines(found: Comparison | None) -> Sequence[str]:
    if found is None:
        return []
    return [
        f" step       {found.measured_step_s * 1e3:,.1f} ms; predicted {found.predicted_step_s * 1e3:,.1f} "
        f"({found.step_error:+.0%}, hardware {found.hardware})",
        f" memory     {found.measured_bytes / MIB:,.0f} MiB on rank {found.rank}, the fullest; predicted "
        f"{found.predicted_bytes / MIB:,.0f} ({found.memory_error:+.0%})",
    ]


def _checkpoint_lines(stalls_s: Sequence[float]) -> Sequence[str]:
    if not stalls_s:
        return []
    return [
        f" saved      {len(stalls_s)} checkpoint(s); training waited {sum(stalls_s):.1f} s, "
        f"{statistics.median(stalls_s):.2f} s for each (median)"
    ]


def _wrap(finding: str) -> str:
    return textwrap.fill(finding, WIDTH, initial_indent=" WARNING    ", subsequent_indent=" " * len(" WARNING    "))


def format_metrics(final: dict[str, MetricValues], manifest: Manifest) -> str:
    """Lay out metrics by split for a terminal."""
    return "\n".join(_metric_lines(final, manifest))


def _metric_lines(final: dict[str, MetricValues], manifest: Manifest) -> Sequence[str]:
    header = f" {'split':<11}{'AUC':>8}{'best possible':>15}{'gap':>9}{'NE':>9}{'logloss':>10}{'calibration':>13}"
    lines = [header]
    for split, values in final.items():
        info = manifest.splits.get(split)
        best = info.best_auc if info is not None else None
        known = f"{best:>15.4f}{best - values.auc:>9.4f}" if best is not None else f"{'unknown':>15}{'':>9}"
        lines.append(
            f" {split:<11}{values.auc:>8.4f}{known}{values.ne:>9.4f}{values.logloss:>10.4f}{values.calibration:>13.3f}"
        )
    return lines
