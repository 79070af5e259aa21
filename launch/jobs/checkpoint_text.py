"""What `papilio checkpoint` prints of checkpoints: tables and lines that fit the terminal."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

from papilio.data_pipeline.terminal import format_duration
from papilio.launch.verb_arguments import SPLITS
from papilio.sharding.plan_file import PlanFile
from papilio.sharding.reports.figures import size
from papilio.trainer.checkpoint.contents import WEIGHT, Contents, NamedTensor, num_bytes
from papilio.trainer.checkpoint.folder import Committed, best_of
from papilio.trainer.checkpoint.format import Marker

# Reasons to save, as short as a column wants them, and in words.
REASONS = {
    "every_steps": ("steps", "for checkpoint.every_steps"),
    "every_minutes": ("minutes", "for checkpoint.every_minutes"),
    "best": ("best", "for the best validation so far"),
    "preemption": ("preempted", "when the job was told to end"),
    "end": ("end", "at the end of the run"),
}
# More tables than this are listed with `--all` only.
MAX_TABLES = 32
NUM_LARGEST = 12
MAX_NAMED = 4
# Keeps a name and its version in one line.
GLUE = "\N{NO-BREAK SPACE}"
LABEL_WIDTH = 12


@dataclass(frozen=True)
class Row:
    """One line of the list of checkpoints; a column's name is its field's."""

    name: str
    step: str
    saved: str
    age: str
    why: str
    ranks: str
    size: str
    auc: str
    note: str


# The first of these columns goes first where the terminal is too narrow for all.
DISPENSABLE = ("saved", "ranks", "step")
LEFT_ALIGNED = {"name", "saved", "why", "note", "table", "dtype", "of the optimizer"}
TABLE_HEADINGS = ["table", "rows", "dim", "dtype", "weights", "state", "of the optimizer"]
HEADINGS = {"auc": "AUC", "note": ""}


def format_list(committed: Sequence[Committed], others: Mapping[str, str], now: datetime, columns: int) -> list[str]:
    """Return the checkpoints as a table, newest last; `others` are those that do not count, and why, by name."""
    best = best_of(list(committed))
    rows = [_row(found, found is committed[-1], found is best, now) for found in committed]
    rows += [Row(name, f"{step_of(name):,}", "-", "-", "-", "-", "-", "-", note) for name, note in others.items()]
    rows.sort(key=lambda row: row.name)
    shown = [field.name for field in fields(Row)]
    for dispensable in (None, *DISPENSABLE):
        shown = [name for name in shown if name != dispensable]
        cells = [[HEADINGS.get(name, name) for name in shown]]
        cells += [[getattr(row, name) for name in shown] for row in rows]
        lines = align(cells, [name in LEFT_ALIGNED for name in shown])
        if max(map(len, lines)) <= columns:
            break
    return lines


def describe_total(committed: Sequence[Committed], others: Mapping[str, str], folder: str) -> str:
    """Say in a line how many checkpoints a folder holds."""
    if not committed and not others:
        return f"no checkpoints in {folder} yet"
    total = sum(found.marker.num_bytes for found in committed)
    counted = f"{len(committed)} checkpoint{'s' if len(committed) != 1 else ''}, {size(total)}"
    kinds = Counter(others.values())
    return ", ".join([f"{folder}: {counted}", *(f"{number} {kind}" for kind, number in kinds.items())])


def describe(found: Committed, roles: str, now: datetime, columns: int) -> list[str]:
    """Return what the marker says, a line or paragraph for each thing."""
    marker = found.marker
    progress = marker.progress
    versions = {"papilio": marker.papilio_version, **marker.versions}
    paragraphs = {
        "saved": f"{_time(marker)} UTC ({age(marker, now)} ago) by {_ranks(marker.world_size)}, {_reason(marker)}",
        "size": _total(marker),
        "position": f"step {marker.step:,}; {_position(marker)}",
        "trained": f"{progress['num_samples']:,} samples in {format_duration(progress['train_s'], decimals=1)}, "
        f"{format_duration(progress['wait_s'], decimals=1)} of it waiting for data",
        "validated": _validations(marker),
        "optimizers": _optimizers(marker.config),
        "data": _data(marker.data),
        "versions": ", ".join(f"{name}{GLUE}{version}" for name, version in versions.items()),
    }
    head = f"{found.name}  {roles}".rstrip()
    return [head, "", *(line for label, text in paragraphs.items() for line in paragraph(label, text, columns))]


def describe_plan(plan: PlanFile, columns: int) -> list[str]:
    """Return the plan it was saved under in a paragraph."""
    kinds = Counter(table.sharding_type for table in plan.tables)
    kernels = Counter(table.compute_kernel for table in plan.tables)
    groups = f" in {plan.machine.num_groups} groups" if plan.machine.num_groups > 1 else ""
    text = f"{_ranks(plan.machine.num_ranks)}{groups} ({plan.machine.hardware}); "
    text += ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    if set(kernels) != {"fused"}:
        text += "; " + ", ".join(f"{number} {kernel}" for kernel, number in kernels.most_common())
    return paragraph("plan", text, columns)


def describe_history(marker: Marker, columns: int) -> list[str]:
    """Return the runs of the job, from the first on, and what had changed at each."""
    lines = ["runs of this job"]
    for number, run in enumerate(marker.progress["history"]):
        begin = f"  from step {run['step']:,}" if number else "  from the start"
        lines.append(f"{begin} on {_ranks(run['world_size'])}, papilio {run['papilio_version']}")
        for key, (old, new) in run["changes"].items():
            lines += textwrap.wrap(
                f"{key} = {new}, was {old}", columns, initial_indent="    ", subsequent_indent="      "
            )
    return lines


def describe_tensors(contents: Contents, columns: int, *, show_all: bool) -> list[str]:
    """Return the tables and the dense part, with what their optimizers remember of them."""
    tables = dict(contents.tables)
    rest: list[tuple[NamedTensor, ...]] = []
    if len(tables) > MAX_TABLES and not show_all:
        largest = sorted(tables, key=lambda table: -num_bytes(tables[table]))[:NUM_LARGEST]
        rest = [tables[table] for table in tables if table not in largest]
        tables = {table: tables[table] for table in largest}
    cells = [TABLE_HEADINGS, *(_table_cells(table, tensors) for table, tensors in tables.items())]
    if rest:
        weights = sum(tensors[0].tensor.num_bytes for tensors in rest)
        states = sum(map(num_bytes, rest)) - weights
        cells.append([f"{len(rest)} smaller", "", "", "", size(weights), size(states), "--all lists each"])
    cells.append(_dense_cells(contents))
    lines = align(cells, [name in LEFT_ALIGNED for name in TABLE_HEADINGS])
    lines = [line if len(line) <= columns else f"{line[: columns - 1]}…" for line in lines]
    blocks = _column_blocks(contents)
    return [*lines, *(["", *textwrap.wrap(blocks, columns)] if blocks else [])]


def describe_removal(found: Committed, now: datetime) -> list[str]:
    """Return a line's cells for one that goes or stays."""
    auc = found.validation_auc
    return [
        found.name,
        size(found.marker.num_bytes),
        f"{age(found.marker, now)} old",
        "" if math.isnan(auc) else f"AUC {auc:.4f}",
    ]


def age(marker: Marker, now: datetime) -> str:
    """Say how long ago it was saved."""
    return duration_in_words((now - datetime.fromisoformat(marker.saved_at)).total_seconds())


def duration_in_words(seconds: float) -> str:
    """Say a duration in the largest unit that leaves two digits or more, or one of seconds."""
    seconds = max(0.0, seconds)
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def paragraph(label: str, text: str, columns: int) -> list[str]:
    """Return a labelled text in lines."""
    first, others = f"  {label:<{LABEL_WIDTH}}", " " * (LABEL_WIDTH + 2)
    lines = textwrap.wrap(text, columns, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
    return [line.replace(GLUE, " ") for line in lines]


def joined(sections: Iterable[Sequence[str]]) -> str:
    """Return sections with an empty line between them."""
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def rate(num_bytes: int, seconds: float) -> str:
    """Say how long so many bytes took, and how many that is each second."""
    return f"{seconds:.1f} s, {size(num_bytes / max(seconds, 1e-3))}/s"


def align(cells: Sequence[Sequence[str]], is_left: Sequence[bool]) -> list[str]:
    """Return rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(is_left))]
    return [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, is_left, strict=True)
        ).rstrip()
        for row in cells
    ]


def step_of(name: str) -> int:
    """Return the step in a checkpoint's name."""
    return int(name.removeprefix("step_").partition("-")[0])


def utc_now() -> datetime:
    """Return the time by which ages are told."""
    return datetime.now(UTC)


def _row(found: Committed, is_newest: bool, is_best: bool, now: datetime) -> Row:
    marker, auc = found.marker, found.validation_auc
    return Row(
        name=found.name,
        step=f"{marker.step:,}",
        saved=_time(marker),
        age=age(marker, now),
        why=REASONS.get(marker.saved_for, (marker.saved_for,))[0],
        ranks=str(marker.world_size),
        size=size(marker.num_bytes),
        auc="-" if math.isnan(auc) else f"{auc:.4f}",
        note=", ".join(role for role, holds in (("newest", is_newest), ("best", is_best)) if holds),
    )


def _time(marker: Marker) -> str:
    return datetime.fromisoformat(marker.saved_at).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def _reason(marker: Marker) -> str:
    return REASONS[marker.saved_for][1] if marker.saved_for in REASONS else marker.saved_for


def _total(marker: Marker) -> str:
    copies = f"; {marker.num_copies} copies of the model, with tables of their own" if marker.num_copies > 1 else ""
    return f"{size(marker.num_bytes)} in {len(marker.files)} files{copies}"


def _position(marker: Marker) -> str:
    position = marker.progress["position"]
    rows = marker.data["splits"]["train"]["num_rows"]
    if position["sample"] == 0 and position["epoch"]:
        return f"{position['epoch']} whole epoch(s) of {rows:,} samples"
    return f"epoch {position['epoch']}, sample {position['sample']:,} of {rows:,}"


def _validations(marker: Marker) -> str:
    validations = marker.progress["validations"]
    if not validations:
        return "never"
    step, latest = validations[-1]
    text = ", ".join(
        f"{name} {latest[key]:.4f}" for name, key in (("AUC", "auc"), ("NE", "ne"), ("logloss", "logloss"))
    )
    best_step, best = max(validations, key=lambda found: (not math.isnan(found[1]["auc"]), found[1]["auc"]))
    text = f"after step {step:,}: {text}"
    return text if best_step == step else f"{text}; best AUC {best['auc']:.4f} after step {best_step:,}"


def _optimizers(config: Mapping[str, Any]) -> str:
    sections = config["optimizer"]
    told = [
        f"{sections[kind]['name']} (learning rate {sections[kind]['learning_rate']:g})" for kind in ("sparse", "dense")
    ]
    return f"tables {told[0]}, dense part {told[1]}"


def _data(data: Mapping[str, Any]) -> str:
    names = [name for name in SPLITS if name in data["splits"]]
    rows = _and([f"{data['splits'][name]['num_rows']:,} {name}" for name in names])
    shards = sum(len(split["shards"]) for split in data["splits"].values())
    checked = sum(crc32 is not None for crc32 in data["vocabularies"].values())
    vocabularies = f", {checked} vocabularies" if checked else ""
    transform = f"transform version {data['transform_version']}"
    return f"{data['path']}: {rows} samples; {shards} shards{vocabularies}, {transform}"


def _table_cells(table: str, tensors: Sequence[NamedTensor]) -> list[str]:
    weight = next(named.tensor for named in tensors if named.name == WEIGHT)
    states = tuple(named for named in tensors if named.name != WEIGHT)
    rows, dim = weight.shape
    told = [size(num_bytes(states)), ", ".join(map(_state, states))] if states else ["-", ""]
    return [table, f"{rows:,}", str(dim), weight.dtype, size(weight.num_bytes), *told]


def _state(named: NamedTensor) -> str:
    starts = named.tensor.column_starts
    state = named.name.rpartition(".")[2]
    if starts is None:
        return state
    if len(starts) == 1:
        return f"{state} by row"
    return f"{state} by row, {len(starts)} blocks"


def _column_blocks(contents: Contents) -> str | None:
    """Say where blocks of columns begin that have a state of their own, by tables alike."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for table, tensors in contents.tables.items():
        starts = next((named.tensor.column_starts for named in tensors if named.tensor.column_starts is not None), (0,))
        if len(starts) > 1:
            alike.setdefault(starts, []).append(table)
    if not alike:
        return None
    told = []
    for starts, tables in alike.items():
        which = ", ".join(tables) if len(tables) <= MAX_NAMED else f"{len(tables)} tables"
        begins = (
            ", ".join(map(str, starts)) if len(starts) <= MAX_NAMED else f"{starts[0]}, {starts[1]}, ... {starts[-1]}"
        )
        told.append(f"{begins} ({which})" if len(alike) > 1 else begins)
    return f"blocks: of columns, each with a value of its own for a row; they begin at column {'; '.join(told)}"


def _dense_cells(contents: Contents) -> list[str]:
    dtypes = ", ".join(sorted({named.tensor.dtype for named in contents.dense}))
    states = sorted({named.name.rpartition(".")[2] for named in contents.dense_optimizer})
    told = [size(num_bytes(contents.dense_optimizer)), ", ".join(states)] if states else ["-", ""]
    return ["dense part", "", "", dtypes, size(num_bytes(contents.dense)), *told]


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _ranks(number: int) -> str:
    return f"{number} rank{'s' if number != 1 else ''}"
