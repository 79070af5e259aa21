"""Asks the planner, in a process of its own, whether the job fits and what it will need."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from papilio.launch.preflight.facts import PlanFacts
from papilio.sharding.plan_file import PlanFileError, plan_from_json
from papilio.trainer.elastic.bootstrap import child_command
from papilio.trainer.run.plan_options import PlanOptions

TIMEOUT_S = 300
PREFIX = "papilio plan: error: "


def plan_job(recipe: str, overrides: Sequence[str], hardware: str | None, num_hosts: int, nproc: int) -> PlanFacts:
    """Plan the job as `papilio plan` does."""
    options = PlanOptions(
        recipe=recipe,
        overrides=tuple(overrides),
        hardware=hardware or None,
        num_nodes=num_hosts,
        ranks_per_node=nproc,
        as_json=True,
    )
    command = child_command("papilio.trainer.run.plan_run", options.to_argument())
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode:
            return PlanFacts(error=_last_words(done.stderr) or f"papilio plan ended with status {done.returncode}")
        plan = plan_from_json(done.stdout, "the plan")
    except subprocess.TimeoutExpired:
        return PlanFacts(error=f"papilio plan took more than {TIMEOUT_S} s")
    except PlanFileError as error:
        return PlanFacts(error=str(error))
    return PlanFacts(
        hardware=plan.machine.hardware,
        device=plan.machine.device,
        rank_device_bytes=tuple(rank.memory.device_bytes for rank in plan.ranks),
        rank_host_bytes=tuple(rank.memory.host_bytes for rank in plan.ranks),
        num_ranks=plan.machine.num_ranks,
        model_bytes=sum(table.weights_bytes + table.optimizer_bytes for table in plan.tables),
        step_s=plan.step.total_s,
        samples_per_s=plan.samples_per_s,
    )


def _last_words(text: str) -> str:
    """Return the planner's message, or the last line of a traceback."""
    begin = text.rfind(PREFIX)
    if begin >= 0:
        return text[begin + len(PREFIX) :].strip()
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
