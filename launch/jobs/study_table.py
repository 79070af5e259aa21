"""A scaling study as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("ranks", "hosts", "batch", "samples/s", "efficiency", "predicted", "efficiency", "error")
UNKNOWN = "-"


def format_study(study: Mapping[str, Any]) -> str:
    """Lay out a study, as study.json holds it.

    Efficiency is samples/s of a rank, as a share of that with the fewest ranks; measured and predicted each by itself.
    """
    settings, rows = study["settings"], study["rows"]
    cells = [COLUMNS, *(_cells(row, rows) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(COLUMNS))]
    lines = [f"{settings['recipe']}: {settings['scaling']} scaling, median over windows of {settings['steps']} steps"]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    lines += [f"  {row['num_ranks']} ranks on {row['num_hosts']} host(s): {row['note']}" for row in rows if row["note"]]
    profiles = sorted({row["hardware"] for row in rows if row["hardware"]})
    lines += [f"predicted for {', '.join(profiles)}"] if profiles else []
    most = max((row["num_ranks"] for row in rows if row["measured_samples_per_s"]), default=0)
    if most > settings["num_cores"]:
        lines.append(f"more ranks than the {settings['num_cores']} cores here take turns: no measure of scaling")
    return "\n".join(lines)


def _cells(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    error = row["prediction_error"]
    return (
        f"{row['num_ranks']:,}",
        f"{row['num_hosts']:,}",
        f"{row['global_batch_size']:,}",
        _rate(row["measured_samples_per_s"]),
        _efficiency(row, rows, "measured_samples_per_s"),
        _rate(row["predicted_samples_per_s"]),
        _efficiency(row, rows, "predicted_samples_per_s"),
        UNKNOWN if error is None else f"{error:+.0%}",
    )


def _rate(samples_per_s: float | None) -> str:
    return UNKNOWN if samples_per_s is None else f"{samples_per_s:,.0f}"


def _efficiency(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], key: str) -> str:
    known = [other for other in rows if other[key] and other["hardware"] == row["hardware"]]
    if not row[key] or not known:
        return UNKNOWN
    first = min(known, key=lambda other: int(other["num_ranks"]))
    return f"{row[key] / row['num_ranks'] / (first[key] / first['num_ranks']):.0%}"
