"""A stand-in for training, for tests of agents: `python -m tests.support.toy_job FOLDER [--what=value ...]`.

Each rank adds its steps to FOLDER/steps_<rank>, and all resume at the step in FOLDER/checkpoint.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from papilio.trainer.elastic.exit_codes import NO_RESTART_EXIT_CODE, RESUME_EXIT_CODE, exit_now
from papilio.trainer.elastic.health import heartbeat_monitor as silence
from papilio.trainer.elastic.health.failures import LostRankError
from papilio.trainer.elastic.health.job_health import JobHealth, job_health
from papilio.trainer.elastic.preemption import Preemption, watch_for_preemption
from papilio.trainer.process_group import Ranks, process_group


class RefusalError(ValueError):
    """A mistake that would be made again."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--step-s", type=float, default=0.02)
    parser.add_argument("--save-s", type=float, default=0.0)
    parser.add_argument("--stall-timeout-s", type=float, default=60.0)
    parser.add_argument("--lost-after-s", type=float, default=silence.LOST_AFTER_S)
    parser.add_argument("--event", default="", help="kind:rank:step")
    parser.add_argument("--times", type=int, default=1, help="how often the event happens")
    options = parser.parse_args()
    silence.LOST_AFTER_S = options.lost_after_s
    with (
        process_group() as ranks,
        job_health(ranks, options.stall_timeout_s) as health,
        watch_for_preemption(ranks) as preemption,
    ):
        return train(options, ranks, health, preemption)


def train(options: argparse.Namespace, ranks: Ranks, health: JobHealth, preemption: Preemption) -> int:
    checkpoint = options.folder / "checkpoint"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    (options.folder / f"pid_{ranks.rank}").write_text(str(os.getpid()))
    if ranks.is_first:
        print(f"toy begins at step {step} on {ranks.world_size}", flush=True)
    while step < options.steps:
        step += 1
        happen(options, ranks.rank, step)
        time.sleep(options.step_s)
        value = torch.ones(1)
        dist.all_reduce(value)
        assert value.item() == ranks.world_size
        health.mark(step)
        is_preempted = preemption.is_agreed(step)
        if is_preempted or step % 5 == 0:
            time.sleep(options.save_s if is_preempted else 0)
            save(checkpoint, step, is_first=ranks.is_first)
        if is_preempted:
            print(f"saved at {step}", flush=True)
            return RESUME_EXIT_CODE
    if ranks.is_first:
        print(f"toy ends at step {step} on {ranks.world_size}", flush=True)
    return 0


def happen(options: argparse.Namespace, rank: int, step: int) -> None:
    """Let the event of the options happen, the first times."""
    kind, _, place = options.event.partition(":")
    happened = options.folder / "happened"
    count = len(happened.read_text()) if happened.exists() else 0
    if place != f"{rank}:{step}" or count == options.times:
        return
    happened.write_text("x" * (count + 1))
    if kind == "raise":
        raise ValueError("this rank fails on purpose")
    if kind == "sleep":
        time.sleep(1000)
    if kind == "refuse":
        raise RefusalError("this rank refuses on purpose")
    os.kill(os.getpid(), getattr(signal, kind))


def save(checkpoint: Path, step: int, *, is_first: bool) -> None:
    if is_first:
        temporary = checkpoint.with_suffix(".new")
        temporary.write_text(str(step))
        temporary.rename(checkpoint)
    dist.barrier()


if __name__ == "__main__":
    try:
        status = main()
    except LostRankError as error:
        print(f"toy: error: {error}", file=sys.stderr)
        status = 1
    except ValueError as error:
        print(f"toy: mistake: {error}", file=sys.stderr)
        status = NO_RESTART_EXIT_CODE if isinstance(error, RefusalError) else 1
    exit_now(status)
