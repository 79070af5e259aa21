"""The two shell scripts of a job on Slurm: job.sh, which sbatch gets, and host.sh, which each host runs.

They are the files beside this one, after a head that is this job's own.

A plain job of N hosts with one task each, not TorchX's heterogeneous job of N components of one host: it needs no
backfill scheduler, has one state instead of N, and squeue shows it in one line. What else is different:

- environment values are exported in host.sh; `srun --export=A=1,2` would cut the value at its comma;
- srun is told the CPUs of a task, which since Slurm 22.05 it no longer takes from the job by itself;
- a host that failed lets the others end by themselves for some seconds, before srun kills them; the job's status is
  that of the host that failed first, where srun has the largest, often that of a host it killed itself;
- a host that neither ended nor answers is lost, and the job is requeued: Slurm itself notices after SlurmdTimeout only
  (300 s), and until then the surviving hosts' failure would look like the job's own;
- an elastic job (--nnodes 2:4) goes on without a host that is lost, and succeeds when its remaining hosts do;
- status 75 (saved, resume me) leads to a requeue, unless the job was cancelled; other failures to another attempt on
  the same hosts at once, as often as max_retries says, but status 78 of any host (it would go wrong again) to none. A
  requeue would wait for the 2 minutes that Slurm builds in.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from torchx import specs

from papilio.launch.schedulers.slurm.sbatch_options import UNPRINTABLE, pattern_of
from papilio.trainer.elastic.exit_codes import NO_RESTART_EXIT_CODE, RESUME_EXIT_CODE

# The variable in which TorchX's components, and launch/start.py, find the first host; TorchX's own name for it.
FIRST_HOST = "TORCHX_RANK0_HOST"
# What the other hosts get after one has failed: to hear of it, let their ranks speak, and end by themselves.
WAIT_FOR_HOSTS_S = 10
POLLS_PER_S = 5
# For a host to say that it is there.
PROBE_TIMEOUT_S = 30
UNSAVED = "nothing was saved before the time limit"
# What TorchX fills in at submission is known here only when the job runs.
RUNTIME_VALUES = {specs.macros.app_id: "$SLURM_JOB_ID", specs.macros.replica_id: "$SLURM_NODEID"}


@dataclass(frozen=True)
class SlurmScripts:
    """One job, as files."""

    job: str
    host: str


def quote(word: str) -> str:
    """Quote a word for the shell, but for what only the running job knows."""
    pieces = [word]
    for macro, variable in RUNTIME_VALUES.items():
        pieces = [piece for part in pieces for piece in _split(part, macro, f'"{variable}"')]
    return "".join(piece if piece in _variables() else shlex.quote(piece) for piece in pieces if piece) or "''"


def _variables() -> set[str]:
    return {f'"{variable}"' for variable in RUNTIME_VALUES.values()}


def _split(text: str, macro: str, variable: str) -> list[str]:
    if text in _variables():
        return [text]
    first, *rest = text.split(macro)
    return [first, *(piece for part in rest for piece in (variable, part))]


def resolve_role(role: specs.Role) -> specs.Role:
    """Fill in what is known at submission."""
    values = specs.macros.Values(
        img_root="", app_id=specs.macros.app_id, replica_id=specs.macros.replica_id, rank0_env=FIRST_HOST
    )
    return values.apply(role)


def render(
    role: specs.Role, *, title: str, folder: str, sbatch_options: list[str], has_time_limit: bool = False
) -> SlurmScripts:
    """Return the scripts of a job whose role was resolved; its replicas are its hosts."""
    is_elastic = role.min_replicas is not None and role.min_replicas < role.num_replicas
    srun = ["--ntasks-per-node=1", "--wait=0", "--open-mode=append", "--unbuffered"]
    srun += ["--kill-on-bad-exit=0", "--no-kill"] if is_elastic else ["--kill-on-bad-exit=1"]
    if role.resource.cpu > 0:
        srun.append(f"--cpus-per-task={role.resource.cpu}")
    job = _script(
        "job.sh",
        [f"# {UNPRINTABLE.sub(' ', title)}", *(f"#SBATCH {option}" for option in sbatch_options)],
        folder=shlex.quote(folder),
        logs=shlex.quote(pattern_of(Path(folder))),
        retries=role.max_retries,
        is_elastic=int(is_elastic),
        has_time_limit=int(has_time_limit),
        srun_options=f"({' '.join(srun)})",
        resume=RESUME_EXIT_CODE,
        no_restart=NO_RESTART_EXIT_CODE,
        probe_timeout_s=PROBE_TIMEOUT_S,
        unsaved=shlex.quote(UNSAVED),
    )
    environment = {"PYTHONUNBUFFERED": "1", **role.env}
    exports = [f"    export {name}={quote(value)}" for name, value in environment.items()]
    command = " ".join(quote(word) for word in [role.entrypoint, *role.args])
    host = _script(
        "host.sh",
        ["run() {", *exports, f"    exec {command}", "}"],
        folder=shlex.quote(folder),
        num_polls=WAIT_FOR_HOSTS_S * POLLS_PER_S,
        poll_s=1 / POLLS_PER_S,
    )
    return SlurmScripts(job, host)


def _script(name: str, head: list[str], **assignments: object) -> str:
    """Return a script beside this module, after a head and the assignments that it asks for."""
    _, body = (resources.files(__package__) / name).read_text("utf-8").split("\n", 1)
    lines = ["#!/bin/bash", *head, *(f"{name}={value}" for name, value in assignments.items())]
    return "\n".join(lines) + "\n" + body
