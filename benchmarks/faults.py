"""Kill training at random moments, start it again, and see whether anything is lost.

    python -m benchmarks.faults [--kills 200] [--ranks 1 2 4] [--seed 1] [--json FILE] [--short]

Jobs of one kind keep their number of ranks; those of the last kind change it with every start. Each is killed (SIGKILL
to a random rank, or to all) up to 20 times, half of them while a checkpoint is being written, and then runs to its end.
That is held against a run that nobody disturbed: every tensor of the last checkpoint, all metrics, and the samples that
went into the model, from logs that the ranks write while they train.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.faults_data import (
    FULL,
    SHORT,
    TYPES_OF_CHANGING_RANKS,
    TYPES_OF_FIXED_RANKS,
    Size,
    write_data,
    write_recipe,
)
from benchmarks.faults_evidence import (
    Difference,
    Ending,
    compare,
    lineage,
    lost_and_repeated,
    read_ending,
    read_logs,
)
from benchmarks.faults_killer import Job, Killer
from benchmarks.faults_ranks import Zygote

KILLS_PER_JOB = 20
# What a model may differ by, once its sums were taken over another number of ranks.
TOLERANCE = 1e-5
CHANGING = "changing"
COLUMNS = (
    "ranks",
    "jobs",
    "starts",
    "kills",
    "in saves",
    "in prunes",
    "in start-up",
    "between",
    "at the end",
    "uncommitted, swept",
    "damaged",
    "not from the newest",
    "samples lost, repeated",
    "unequal tensors",
    "largest difference: tensors, metrics",
    "other ranks ended after, s: median, most",
    "asked to stop",
    "stuck",
)


@dataclass(frozen=True)
class Verdict:
    """What came of a job, against the run that nobody disturbed.

    Attributes:
        kind: "2 ranks" or "changing".
        lost, repeated: samples that an epoch lacks, or has again.
        other_batches: steps with another set of samples.
    """

    kind: str
    job: Job
    lost: int
    repeated: int
    other_batches: int
    difference: Difference

    @property
    def num_kills(self) -> int:
        """Kills in all."""
        return sum(self.job.kills.values())

    @property
    def is_well(self) -> bool:
        """Whether nothing was lost."""
        faults = (self.lost, self.repeated, self.other_batches, self.job.damaged, self.job.stuck, self.job.not_newest)
        is_swept = self.job.uncommitted == self.job.swept
        difference = self.difference
        is_close = max(difference.tensor, difference.metric) <= TOLERANCE and difference.structure is None
        return not any(faults) and is_swept and (is_close if self.kind == CHANGING else difference.is_bit_equal)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        job = {key: value for key, value in vars(self.job).items() if key != "attempts"}
        figures = {**vars(self), **job, "kills": dict(self.job.kills), "difference": asdict(self.difference)}
        del figures["job"]
        return {**figures, "world_sizes": self.job.world_sizes, "is_well": self.is_well}


@dataclass(frozen=True)
class Expected:
    """A run that nobody disturbed: what it ended with, and the samples of its steps."""

    ending: Ending
    steps: list[list[int]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--short", action="store_true", help="smaller tables and fewer steps")
    parser.add_argument("--keep", help="folder to leave runs and logs in")
    options = parser.parse_args()
    kinds = [*([size] for size in options.ranks), *([options.ranks] if len(options.ranks) > 1 else [])]
    with tempfile.TemporaryDirectory() as folder:
        verdicts = []
        size = SHORT if options.short else FULL
        for verdict in run_jobs(options.keep or folder, size, kinds, options.kills, options.seed):
            verdicts.append(verdict)
            print(
                f"{verdict.kind}: job {len(verdicts)}, {verdict.num_kills} kills, well: {verdict.is_well}", flush=True
            )
    print(table(verdicts), flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump([verdict.to_dict() for verdict in verdicts], file, indent=1)
    return 0 if all(verdict.is_well for verdict in verdicts) else 1


def run_jobs(
    folder: str,
    size: Size,
    kinds: Sequence[Sequence[int]],
    num_kills: int,
    seed: int,
    kills_per_job: int = KILLS_PER_JOB,
) -> Iterator[Verdict]:
    """Run jobs of all kinds in turn until there were so many kills, and yield what came of each.

    Args:
        folder: where to, emptied of each job that went well.
        size: how much to train.
        kinds: the numbers of ranks that a job of each kind may have.
        num_kills: kills in all.
        seed: decides the moments and the victims, as far as the machine's speed does not.
        kills_per_job: most kills of a job, after which it may run to its end.
    """
    os.makedirs(folder, exist_ok=True)
    write_data(os.path.join(folder, "data"), size)
    randomness = random.Random(seed)
    zygote = Zygote()
    expected: dict[tuple[int, ...], Expected] = {}
    num_jobs = 0
    try:
        while num_kills > 0 or num_jobs < len(kinds):
            world_sizes = tuple(kinds[num_jobs % len(kinds)])
            killer = _killer(folder, size, world_sizes, zygote, randomness)
            if world_sizes not in expected:
                expected[world_sizes] = _undisturbed(killer, folder, size, world_sizes)
            run_dir = os.path.join(folder, f"job_{num_jobs:03}")
            job = killer.run_and_kill(run_dir, world_sizes, max(1, min(num_kills, kills_per_job)))
            verdict = _judge(job, size, world_sizes, expected[world_sizes])
            num_kills -= verdict.num_kills
            num_jobs += 1
            if verdict.is_well:
                shutil.rmtree(run_dir)
            yield verdict
    finally:
        zygote.close()


def _killer(folder: str, size: Size, world_sizes: tuple[int, ...], zygote: Zygote, randomness: random.Random) -> Killer:
    types = TYPES_OF_FIXED_RANKS if len(world_sizes) == 1 else TYPES_OF_CHANGING_RANKS
    name = "fixed" if len(world_sizes) == 1 else CHANGING
    recipe = write_recipe(os.path.join(folder, f"{name}.toml"), os.path.join(folder, "data"), size, types)
    return Killer(zygote, recipe, size, randomness)


def _undisturbed(killer: Killer, folder: str, size: Size, world_sizes: tuple[int, ...]) -> Expected:
    """Run on the first number of ranks; for a job that changes it, any is as good."""
    run_dir = os.path.join(folder, "undisturbed_" + "_".join(map(str, world_sizes)))
    job = killer.run_undisturbed(run_dir, world_sizes[0])
    return Expected(read_ending(run_dir), lineage([read_logs(a) for a in job.attempts], size.num_steps))


def _judge(job: Job, size: Size, world_sizes: tuple[int, ...], expected: Expected) -> Verdict:
    steps = lineage([read_logs(attempt) for attempt in job.attempts], size.num_steps)
    lost, repeated = lost_and_repeated(steps, size)
    return Verdict(
        kind=f"{world_sizes[0]} rank(s)" if len(world_sizes) == 1 else CHANGING,
        job=job,
        lost=lost,
        repeated=repeated,
        other_batches=sum(1 for one, other in zip(steps, expected.steps, strict=True) if one != other),
        difference=compare(read_ending(job.run_dir), expected.ending),
    )


def table(verdicts: Sequence[Verdict]) -> str:
    """Sum up by kind, as a table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for kind in dict.fromkeys(verdict.kind for verdict in verdicts):
        lines.append(_row(kind, [verdict for verdict in verdicts if verdict.kind == kind]))
    lines.append(_row("all", verdicts))
    return "\n".join(lines)


def _row(kind: str, verdicts: Sequence[Verdict]) -> str:
    kills = sum((verdict.job.kills for verdict in verdicts), Counter[str]())
    jobs = [verdict.job for verdict in verdicts]
    ends_s = [end_s for job in jobs for end_s in job.survivors_end_s]
    worst = max(verdicts, key=lambda verdict: verdict.difference.tensor)
    cells = [
        kind,
        len(jobs),
        sum(len(job.attempts) for job in jobs),
        kills.total(),
        *(kills[hit] for hit in ("save", "prune", "start-up", "training", "end")),
        f"{sum(job.uncommitted for job in jobs)}, {sum(job.swept for job in jobs)}",
        sum(job.damaged for job in jobs),
        sum(job.not_newest for job in jobs),
        f"{sum(v.lost for v in verdicts)}, {sum(v.repeated for v in verdicts)}",
        sum(v.difference.num_unequal for v in verdicts),
        f"{worst.difference.tensor:.1e}, {max(v.difference.metric for v in verdicts):.1e}",
        f"{statistics.median(ends_s):.1f}, {max(ends_s):.1f}" if ends_s else "",
        sum(job.told_to_end for job in jobs),
        sum(job.stuck for job in jobs),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    sys.exit(main())
