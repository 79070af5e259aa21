"""What `benchmarks.faults` holds against each other: samples trained, by lineage, and what two runs ended with."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.faults_data import Size
from benchmarks.faults_ranks import Attempt
from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.checkpoint.read_blocks import read_block

TIMES = ("samples_per_s", "data_wait_share")


@dataclass(frozen=True)
class Trained:
    """What the logs of one attempt say.

    Attributes:
        resumed: folder of the checkpoint it went on from; None for one that began at the start.
        mark: its mark in the names of the checkpoints that it saved; None if it did not come so far.
        steps: samples by step (from 0) and rank.
        world_size: its ranks.
    """

    resumed: str | None
    mark: str | None
    steps: dict[int, dict[int, list[int]]]
    world_size: int


def read_logs(attempt: Attempt) -> Trained:
    """Read what the ranks of an attempt noted; lines that were cut off by a kill do not count."""
    resumed, marks, steps = set(), set(), dict[int, dict[int, list[int]]]()
    for rank in range(attempt.world_size):
        path = attempt.samples_path(rank)
        for line in open(path, encoding="utf-8") if os.path.exists(path) else ():  # noqa: SIM115  # read to its end
            entry = json.loads(line) if line.endswith("\n") else {}
            resumed |= {entry["resumed"]} if "resumed" in entry else set()
            marks |= {entry["mark"]} if "mark" in entry else set()
            if "step" in entry:
                steps.setdefault(entry["step"], {})[rank] = entry["samples"]
    assert len(resumed) <= 1 and len(marks) <= 1, "the ranks of an attempt disagree"
    return Trained(next(iter(resumed), None), next(iter(marks), None), steps, attempt.world_size)


def joined_ranks(attempt: Attempt) -> list[int]:
    """Return the ranks of an attempt that came so far as to join the others."""
    paths = [attempt.samples_path(rank) for rank in range(attempt.world_size)]
    return [rank for rank, path in enumerate(paths) if os.path.exists(path) and os.path.getsize(path)]


def lineage(attempts: list[Trained], num_steps: int) -> list[list[int]]:
    """Return the samples of every step that the last attempt's model was trained with, over all ranks.

    A model that went on from a checkpoint has the steps before it of the attempt that saved that one, by the mark in
    its name, and so on to the beginning.

    Raises:
        ValueError: a step is missing from the logs of a rank.
    """
    by_mark = {attempt.mark: attempt for attempt in attempts if attempt.mark is not None}
    samples: list[list[int]] = []
    attempt, end = attempts[-1], num_steps
    while True:
        begin = step_of(attempt.resumed) if attempt.resumed is not None else 0
        samples = [_samples_of(attempt, step) for step in range(begin, end)] + samples
        if attempt.resumed is None:
            return samples
        attempt, end = by_mark[attempt.resumed.rpartition("-")[2]], begin


def _samples_of(attempt: Trained, step: int) -> list[int]:
    by_rank = attempt.steps.get(step, {})
    if len(by_rank) != attempt.world_size:
        raise ValueError(f"step {step} was trained by ranks {sorted(by_rank)} of {attempt.world_size} only")
    return sorted(sample for samples in by_rank.values() for sample in samples)


def step_of(name: str) -> int:
    """Step in the name of a checkpoint's folder."""
    return int(name.removeprefix("step_").partition("-")[0])


def lost_and_repeated(steps: list[list[int]], size: Size) -> tuple[int, int]:
    """Count the samples that an epoch lacks, and those that it has again, over all epochs."""
    per_epoch = size.num_steps // size.epochs
    lost = repeated = 0
    for epoch in range(size.epochs):
        counts = Counter(sample for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for sample in step)
        lost += sum(1 for sample in range(size.train_samples) if not counts[sample])
        repeated += sum(counts.values()) - len(counts)
    return lost, repeated


@dataclass(frozen=True)
class Ending:
    """What a run ended with: tensors by key, and all of its metrics but for times."""

    tensors: dict[str, NDArray[Any]]
    metrics: list[dict[str, Any]]


@dataclass(frozen=True)
class Difference:
    """The largest differences of two endings.

    Attributes:
        num_unequal: tensors with a byte that differs.
        tensor: the largest difference of two values, and `where`.
        relative: the same, each tensor's relative to its largest value.
        metric: the largest difference of two metrics.
        structure: what differs in kind (keys, shapes, lines), or None.
    """

    num_unequal: int
    tensor: float
    where: str
    relative: float
    metric: float
    structure: str | None

    @property
    def is_bit_equal(self) -> bool:
        """Whether nothing differs at all."""
        return not self.num_unequal and not self.metric and self.structure is None


def read_ending(run_dir: str) -> Ending:
    """Read the newest checkpoint and metrics.jsonl of a run that is done."""
    folder = CheckpointFolder(os.path.join(run_dir, "checkpoints"))
    name = folder.committed_names()[-1]
    marker = folder.read_marker(name)
    tensors = {}
    for key, saved in folder.read_index(name, marker).tensors.items():
        values = np.full(saved.shape, np.nan, dtype=saved.dtype)
        for block in saved.blocks:
            raw = np.frombuffer(read_block(os.path.join(folder.path, name), key, block), dtype=saved.dtype)
            window = tuple(slice(o, o + s) for o, s in zip(block.offsets, block.sizes, strict=True))
            values[window] = raw.reshape(block.sizes)
        tensors[key] = values
    with open(os.path.join(run_dir, "metrics.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    metrics = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    metrics.append({"kind": "marker", **{k: marker.progress[k] for k in ("step", "position", "num_samples")}})
    metrics += [{"kind": "marker", "step": step, **values} for step, values in marker.progress["validations"]]
    return Ending(tensors, metrics)


def compare(one: Ending, other: Ending) -> Difference:
    """Hold two endings against each other."""
    structure = _structure(one, other)
    if structure is not None:
        return Difference(0, np.nan, "", np.nan, np.nan, structure)
    unequal, largest, relative, where = 0, 0.0, 0.0, ""
    for key, values in one.tensors.items():
        unequal += values.tobytes() != other.tensors[key].tobytes()
        difference = float(np.max(np.abs(values.astype(np.float64) - other.tensors[key]), initial=0.0))
        scale = float(np.max(np.abs(values), initial=0.0)) or 1.0
        relative = max(relative, difference / scale)
        if not difference <= largest:
            largest, where = difference, key
    pairs = zip(_numbers(one.metrics), _numbers(other.metrics), strict=True)
    metric = max((abs(left - right) for left, right in pairs), default=0.0)
    return Difference(unequal, largest, where, relative, metric, None)


def _structure(one: Ending, other: Ending) -> str | None:
    shapes, other_shapes = ({key: v.shape for key, v in ending.tensors.items()} for ending in (one, other))
    if shapes != other_shapes:
        return f"tensors {sorted(shapes.items() ^ other_shapes.items())}"
    kinds, other_kinds = ([_without_floats(line) for line in ending.metrics] for ending in (one, other))
    for line, other_line in zip(kinds, other_kinds, strict=False):
        if line != other_line:
            return f"metrics {line} and {other_line}"
    return None if len(kinds) == len(other_kinds) else f"{len(kinds)} and {len(other_kinds)} lines of metrics"


def _without_floats(line: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) else value for key, value in line.items()}


def _numbers(lines: list[dict[str, Any]]) -> list[float]:
    return [value for line in lines for value in line.values() if isinstance(value, float)]
