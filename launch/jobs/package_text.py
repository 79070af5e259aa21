"""What `papilio package` prints: lines that fit the terminal."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from papilio.launch.jobs.checkpoint_text import GLUE, align, duration_in_words, joined, paragraph, rate, utc_now
from papilio.sharding.reports.figures import size
from papilio.trainer.inference.package.format import (
    DENSE,
    FORMATS,
    PRECISIONS,
    REPORT_PAGE,
    VOCABULARIES,
    Package,
    PackageManifest,
    TableEntry,
)

__all__ = ["describe", "describe_tables", "joined", "reading", "utc_now"]
# More tables than this are listed with `--all` only.
MAX_TABLES = 32
NUM_LARGEST = 12
HEADINGS = ["table", "rows", "dim", "pooling", "precision", "size", "of fp32", "row error", "largest"]
# The first of these columns goes first where the terminal is too narrow for all.
DISPENSABLE = ("largest", "pooling", "dim")
LEFT_ALIGNED = {"table", "pooling", "precision"}


def describe(package: Package, now: datetime, columns: int) -> list[str]:
    """Return what the manifest says, a line or paragraph for each thing."""
    manifest = package.manifest
    source = manifest.source
    versions = {"papilio": manifest.papilio_version, **manifest.versions}
    made_at = datetime.fromisoformat(manifest.made_at).astimezone(UTC)
    paragraphs = {
        "model": f"{manifest.name}, {manifest.architecture}",
        "from": f"{source.run}, {source.checkpoint}, step {source.step:,}",
        "data": f"{source.data}, transform version {manifest.transform_version}",
        "made": f"{made_at:%Y-%m-%d %H:%M:%S} UTC ({duration_in_words((now - made_at).total_seconds())} ago) with "
        + ", ".join(f"{name}{GLUE}{version.replace(' ', GLUE)}" for name, version in versions.items()),
        "inputs": f"{len(manifest.dense_features)} dense, {len(manifest.tables)} categorical",
        "certified": _certified(package),
        "size": _sizes(manifest),
        "formats": _formats(package),
    }
    return [
        package.folder,
        "",
        *(line for label, text in paragraphs.items() for line in paragraph(label, text, columns)),
    ]


def describe_tables(tables: Sequence[TableEntry], columns: int, *, show_all: bool) -> list[str]:
    """Return the tables; of many, the largest."""
    listed = list(tables)
    rest: list[TableEntry] = []
    if len(listed) > MAX_TABLES and not show_all:
        largest = sorted(listed, key=lambda table: -table.num_bytes)[:NUM_LARGEST]
        rest = [table for table in listed if table not in largest]
        listed = [table for table in listed if table in largest]
    cells = [HEADINGS, *map(_table_cells, listed)]
    if rest:
        cells.append([f"{len(rest)} smaller", "", "", "", _kinds(rest), *_size_cells(rest), "--all", ""])
    cells.append(["all", f"{sum(table.rows for table in tables):,}", "", "", "", *_size_cells(tables), "", ""])
    shown = list(range(len(HEADINGS)))
    for dispensable in (None, *DISPENSABLE):
        shown = [place for place in shown if HEADINGS[place] != dispensable]
        is_left = [HEADINGS[place] in LEFT_ALIGNED for place in shown]
        lines = align([[row[place] for place in shown] for row in cells], is_left)
        if max(map(len, lines)) <= columns:
            break
    return [line if len(line) <= columns else f"{line[: columns - 1]}…" for line in lines]


def reading(manifest: PackageManifest, seconds: float) -> str:
    """Say how much was read, and how fast."""
    return f"{size(manifest.num_bytes)} in {len(manifest.files)} files read in {rate(manifest.num_bytes, seconds)}"


def _certified(package: Package) -> str:
    found = package.manifest.certified
    if found is None:
        return "no (--no-gate): nobody has measured what quantizing costs"
    told = [
        f"{name} {found[key]:.6f}, {found[f'{key}_ratio']:.4%} of fp32's"
        for name, key in (("AUC", "auc"), ("NE", "ne"))
    ]
    where = (
        f"on {found['num_samples']:,.0f} held-out samples; at least {found['min_auc_ratio']:.4%} of the AUC was asked"
    )
    return f"{'; '.join(told)}; {where} for; {REPORT_PAGE} shows all"


def _sizes(manifest: PackageManifest) -> str:
    fp32_bytes = sum(table.fp32_bytes for table in manifest.tables)
    table_bytes = sum(table.num_bytes for table in manifest.tables)
    vocabulary_bytes = sum(
        file.num_bytes for name, file in manifest.files.items() if name.startswith(f"{VOCABULARIES}/")
    )
    vocabularies = f", vocabularies {size(vocabulary_bytes)}" if vocabulary_bytes else ""
    return (
        f"{size(manifest.num_bytes)}: tables {size(table_bytes)} ({table_bytes / fp32_bytes:.1%} of fp32), dense part "
        f"{size(manifest.files[DENSE].num_bytes)}{vocabularies}"
    )


def _formats(package: Package) -> str:
    folder = package.path(FORMATS)
    found = sorted(n for n in os.listdir(folder) if not n.startswith(".")) if os.path.isdir(folder) else []
    return ", ".join(found) if found else "none built yet; `papilio package build` makes them"


def _table_cells(table: TableEntry) -> list[str]:
    quantizer = "" if table.quantizer in {None, "minmax"} else f" {table.quantizer}"
    error = table.row_error
    return [
        table.name,
        f"{table.rows:,}",
        str(table.dim),
        table.pooling,
        f"{table.precision}{quantizer}",
        *_size_cells([table]),
        f"{error.mean_relative:.2%}",
        f"{error.max_relative:.2%}",
    ]


def _size_cells(tables: Sequence[TableEntry]) -> list[str]:
    num_bytes = sum(table.num_bytes for table in tables)
    return [size(num_bytes), f"{num_bytes / sum(table.fp32_bytes for table in tables):.1%}"]


def _kinds(tables: Sequence[TableEntry]) -> str:
    counts = Counter(table.precision for table in tables)
    return ", ".join(f"{counts[precision]} {precision}" for precision in PRECISIONS if counts[precision])
