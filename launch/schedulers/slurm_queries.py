"""What Slurm knows of jobs: from squeue, then from the accounting database where there is one.

Plain columns, not `--json`, whose fields change with every release (and which ignores `-j` in 22.05).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from launch.schedulers.errors import SchedulerError

QUERY_TIMEOUT_S = 60
SQUEUE_COLUMNS = "%i|%j|%T|%N|%r|%S"
SACCT_COLUMNS = "JobID,JobName,State,NodeList,ExitCode,Start"
# A job of TorchX's own slurm scheduler is a heterogeneous one: 12+0, 12+1; those of an array are 12_3.
JOB_ID = re.compile(r"(\d+)(?:\+(\d+))?")
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}


@dataclass(frozen=True)
class SlurmRow:
    """One job, or one component of a heterogeneous job, as Slurm tells it now."""

    job_id: str
    component: int | None
    name: str
    state: str
    hosts: str
    reason: str
    start: str

    @property
    def has_ended(self) -> bool:
        """Whether the state is a last one."""
        return self.state in ENDED


def query_job(job_id: str) -> list[SlurmRow]:
    """Return the rows of a job; none if Slurm has forgotten it (after MinJobAge, without accounting)."""
    return _squeue("-j", job_id) or _sacct("-j", job_id)


def query_jobs() -> list[SlurmRow]:
    """Return all jobs of this user that Slurm remembers, the newest last."""
    rows = {(row.job_id, row.component): row for row in _sacct("--starttime=1970-01-01")}
    rows |= {(row.job_id, row.component): row for row in _squeue("--me")}
    return sorted(rows.values(), key=lambda row: (int(row.job_id), row.component or 0))


def show_job(job_id: str) -> dict[str, str]:
    """Return what `scontrol show job` says of it, by key; nothing once Slurm has forgotten it."""
    done = _run(["scontrol", "show", "job", job_id, "--oneliner"])
    first = done.stdout.split("\n")[0] if done.returncode == 0 else ""
    return dict(re.findall(r"(\S+?)=(.*?)(?= \S+?=|$)", first))


def host_names(hosts: str) -> list[str]:
    """Spell out a list of hosts: n[1-3] is n1, n2, n3."""
    return _run(["scontrol", "show", "hostnames", hosts]).stdout.split() if hosts else []


def cancel_job(job_id: str) -> None:
    """Tell a job to end: its ranks get SIGTERM, and SIGKILL after the cluster's KillWait.

    Raises:
        SchedulerError: Slurm refuses.
    """
    done = _run(["scancel", job_id])
    if done.returncode:
        raise SchedulerError(f"scancel {job_id}: {done.stderr.strip()}")


def partition_memory_mb(partition: str | None) -> int | None:
    """Return the memory of a partition's smallest host, None if it is not known."""
    chosen = ["--partition", partition] if partition else []
    try:
        done = _run(["sinfo", "--noheader", "--noconvert", "--format=%P|%m", *chosen])
    except SchedulerError:
        return None
    rows = [line.split("|") for line in done.stdout.splitlines() if "|" in line]
    amounts = [int(re.sub(r"\D", "", memory)) for name, memory in rows if partition or name.endswith("*")]
    return min(amounts, default=None)


def submit(script: str) -> str:
    """Give a script to sbatch and return the job's id.

    Raises:
        SchedulerError: Slurm refuses it, or is not here.
    """
    done = _run(["sbatch", "--parsable", script])
    if done.returncode:
        reason = "; ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines())
        raise SchedulerError(f"Slurm refused the job: {reason}; the script is {script}")
    return done.stdout.strip().partition(";")[0]


def _squeue(*options: str) -> list[SlurmRow]:
    done = _run(["squeue", "--noheader", "--states=all", f"--format={SQUEUE_COLUMNS}", *options])
    return _rows(done.stdout) if done.returncode == 0 else []


def _sacct(*options: str) -> list[SlurmRow]:
    """Rows of the accounting database; none where the cluster has none, as sacct then fails."""
    command = ["sacct", "--noheader", "--allocations", "--parsable2", f"--format={SACCT_COLUMNS}", *options]
    try:
        done = _run(command)
    except SchedulerError:
        return []
    return _rows(done.stdout) if done.returncode == 0 else []


def _rows(text: str) -> list[SlurmRow]:
    rows = []
    for line in text.splitlines():
        job_id, name, state, hosts, reason, start = line.split("|")
        match = JOB_ID.fullmatch(job_id)
        if match is not None:
            component = int(match[2]) if match[2] else None
            # sacct: "CANCELLED by 0", "CANCELLED+".
            word = state.split()[0].rstrip("+") if state else "UNKNOWN"
            rows.append(SlurmRow(match[1], component, name, word, hosts, reason, start))
    return rows


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise SchedulerError(
            f"there is no {command[0]} on this machine; run this on a login node of the cluster, with Slurm's "
            "programs on PATH"
        ) from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{command[0]} did not answer in {QUERY_TIMEOUT_S} s; is slurmctld up?") from None
