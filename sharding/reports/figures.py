"""Figures and names as the reports write them: sizes, counts, ranks, and the parts of a step and of a memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from papilio.sharding.plan_file import PlanFile

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
BAR_EIGHTHS = " ▏▎▍▌▋▊▉█"
PHASE_NAMES = {
    "input_dist_s": "ids to shards",
    "lookup_s": "lookup",
    "output_dist_s": "embeddings back",
    "gradient_dist_s": "gradients to shards",
    "update_s": "row update",
}
MEMORY_NAMES = {
    "weights_bytes": "weights",
    "optimizer_bytes": "optimizer",
    "cache_bytes": "cache",
    "gradients_bytes": "gradients",
    "activations_bytes": "activations",
    "input_bytes": "input",
    "dense_bytes": "dense",
    "checkpoint_bytes": "copy to save",
    "framework_bytes": "framework",
}


class StepPart(NamedTuple):
    """A part of a step, in the order of the step; a negative time is taken off, being hidden behind other work."""

    key: str
    name: str
    seconds: float


def step_parts(plan: PlanFile) -> list[StepPart]:
    """Return the parts that add up to the step time, those of no time left out."""
    step, phases = plan.step, plan.step.phases
    parts = [
        StepPart("overhead_s", "overhead", step.overhead_s),
        *(StepPart(key, PHASE_NAMES[key], getattr(phases, key)) for key in ("input_dist_s", "lookup_s")),
        StepPart("output_dist_s", PHASE_NAMES["output_dist_s"], phases.output_dist_s),
        StepPart("dense_s", "dense forward, backward", step.dense_s),
        StepPart("gradient_dist_s", PHASE_NAMES["gradient_dist_s"], phases.gradient_dist_s),
        StepPart("update_s", PHASE_NAMES["update_s"], phases.update_s),
        StepPart("all_reduce_s", "dense all-reduce", step.all_reduce_s),
        StepPart("dense_optimizer_s", "dense optimizer", step.dense_optimizer_s),
        StepPart("replica_sync_s", "averaging of groups", step.replica_sync_s),
        StepPart("hidden_s", "hidden by overlap", -step.hidden_s),
    ]
    return [part for part in parts if part.seconds]


def size(num_bytes: float) -> str:
    """Write bytes with the unit that leaves one to four digits before the point; a sign is kept."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= unit:
            return f"{_digits(num_bytes / unit)} {name}"
    return f"{num_bytes:.0f} B"


def count(number: float, num_digits: int = 3) -> str:
    """Write a count shortly: 950, 39.1k, 40.0M; with two digits 39k, 40M."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{_digits(number / unit, num_digits)}{name}"
    return f"{number:.3g}"


def milliseconds(seconds: float) -> str:
    """Write seconds as milliseconds with at least two digits that tell."""
    value = seconds * 1e3
    if abs(value) >= 0.1:
        return f"{value:,.2f}"
    return f"{value:.3f}"


def percent(share: float) -> str:
    """Write a share in whole percent; what is there but less than half of one is written as such."""
    text = f"{share:.0%}"
    return "<1%" if text in ("0%", "-0%") and share else text


def rank_ranges(ranks: Iterable[int], max_length: int | None = None) -> str:
    """Write ranks shortly, such as 0-7,12; where that is longer than `max_length`, say how many: 56 in 0-127."""
    ordered = sorted(set(ranks))
    runs: list[list[int]] = []
    for rank in ordered:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    if max_length is not None and len(text) > max_length:
        return f"{len(ordered)} in {ordered[0]}-{ordered[-1]}"
    return text


def places(ranks: Sequence[int], num_ranks: int) -> str:
    """Say in words which ranks: on rank 3, on ranks 0-7, over all 16 ranks."""
    distinct = set(ranks)
    if num_ranks > 1 and len(distinct) == num_ranks:
        return f"over all {num_ranks} ranks"
    if len(distinct) == 1:
        return f"on rank {next(iter(distinct))}"
    return f"on ranks {rank_ranges(distinct, 24)}"


def bar(share: float, width: int, rest: str = " ") -> str:
    """Draw a share of the width in eighths of a character, and `rest` behind it; a share above one fills it."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    if share > 0 and eighths == 0:
        eighths = 1
    full, part = divmod(eighths, 8)
    return ("█" * full + (BAR_EIGHTHS[part] if part else "")).ljust(width, rest)


def _digits(value: float, num_digits: int = 3) -> str:
    """Write a value with so many digits that tell, and all those before the point."""
    before_point = 3 if abs(value) >= 100 else 2 if abs(value) >= 10 else 1
    return f"{value:,.{max(0, num_digits - before_point)}f}"
