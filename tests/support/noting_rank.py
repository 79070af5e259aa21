"""A rank of a real training job that notes what it trains, for tests/support/host_jobs.py."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import papilio.trainer.train
from benchmarks.faults_ranks import _note_what_is_trained
from papilio.trainer.elastic.exit_codes import exit_now
from papilio.trainer.reporting import Reporter

POLL_S = 0.02


def main(arguments: Sequence[str], step_s: float) -> NoReturn:
    """Train, taking `step_s` longer for each step, and end this process."""
    name = Path("rounds", f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}")
    name.with_name(f"{name.name}.json").write_text(os.environ["WORLD_SIZE"])
    _note_what_is_trained(f"{name}_rank_{os.environ['RANK']}.jsonl")
    record = Reporter.record

    def record_and_wait(self: Reporter, output: Any, step: int) -> None:
        record(self, output, step)
        time.sleep(step_s)
        while step >= int(Path("limit").read_text()):
            time.sleep(POLL_S)

    setattr(Reporter, "record", record_and_wait)  # noqa: B010  # mypy forbids plain assignment
    exit_now(papilio.trainer.train.main(arguments))
