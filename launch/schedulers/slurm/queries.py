"""What Slurm knows of jobs: from squeue, then from the accounting database where there is one.

Plain columns, not `--json`, whose fields change with every release (and which ignores `-j` in 22.05). Between them is a
character that nobody types, as a job's name and folder may hold any other.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from papilio.launch.schedulers.errors import SchedulerError

QUERY_TIMEOUT_S = 60
SEPARATOR = "\x1f"
SQUEUE_COLUMNS = SEPARATOR.join(("%i", "%j", "%T", "%N", "%r", "%S", "%V", "%o"))
SACCT_COLUMNS = "JobID,JobName,State,NodeList,ExitCode,Start,Submit"
# What squeue and scontrol say, with a status other than 0, of a number that is no job's.
NO_SUCH_JOB = "Invalid job id"
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
    submitted_s: float
    command: str
    """The script that was submitted; "" where Slurm does not tell it."""

    @property
    def has_ended(self) -> bool:
        """Whether the state is a last one."""
        return self.state in ENDED


class ControllerError(SchedulerError):
    """slurmctld does not answer, so that nobody knows how its jobs do now."""


def query_job(job_id: str) -> list[SlurmRow]:
    """Return the rows of a job; none if Slurm has forgotten it (after MinJobAge, without accounting).

    Raises:
        ControllerError: slurmctld does not answer, and the database does not know that the job has ended.
    """
    try:
        rows = _squeue("-j", job_id)
    except ControllerError:
        rows = _sacct("-j", job_id)
        if not rows or not all(row.has_ended for row in rows):
            raise
    return rows or _sacct("-j", job_id)


def query_jobs() -> list[SlurmRow]:
    """Return all jobs of this user that Slurm remembers, the newest last; one question, however many they are.

    Raises:
        ControllerError: slurmctld does not answer.
    """
    now = _squeue("--me")
    rows = {(row.job_id, row.component): row for row in _sacct("--starttime=1970-01-01")}
    rows |= {(row.job_id, row.component): row for row in now}
    return sorted(rows.values(), key=lambda row: (int(row.job_id), row.component or 0))


@functools.cache
def cluster_name() -> str:
    """Return the name of the cluster that Slurm's commands talk to here, "" if it does not answer; asked once."""
    found = re.search(r"^ClusterName\s*=\s*(\S+)", _run(["scontrol", "show", "config"]).stdout, re.MULTILINE)
    return found[1] if found else ""


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
        raise SchedulerError(f"job {job_id} was not cancelled, scancel says: {_reason(done)}")


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
        raise SchedulerError(f"Slurm refused the job: {_reason(done)}; the script is {script}")
    return done.stdout.strip().partition(";")[0]


def _squeue(*options: str) -> list[SlurmRow]:
    done = _run(["squeue", "--noheader", "--states=all", f"--format={SQUEUE_COLUMNS}", *options])
    if done.returncode == 0:
        return _rows(done.stdout)
    if NO_SUCH_JOB in done.stderr:
        return []
    raise ControllerError(f"Slurm's controller (slurmctld) does not answer: {_reason(done)}")


def _sacct(*options: str) -> list[SlurmRow]:
    """Rows of the accounting database; none where the cluster has none, as sacct then fails."""
    command = ["sacct", "--noheader", "--allocations", "--parsable2", f"--delimiter={SEPARATOR}"]
    try:
        done = _run([*command, f"--format={SACCT_COLUMNS}", *options])
    except SchedulerError:
        return []
    return _rows(done.stdout) if done.returncode == 0 else []


def _rows(text: str) -> list[SlurmRow]:
    """Read squeue's or sacct's lines; of a job that another program named with an odd character, there are none."""
    rows = []
    for line in text.split("\n"):
        job_id, *columns = line.split(SEPARATOR)
        match = JOB_ID.fullmatch(job_id)
        if match is not None and len(columns) in (6, 7):
            name, state, hosts, reason, start, submitted, *command = columns
            component = int(match[2]) if match[2] else None
            # sacct: "CANCELLED by 0", "CANCELLED+".
            word = state.split()[0].rstrip("+") if state else "UNKNOWN"
            submitted_s = float(submitted) if submitted.isdecimal() else 0.0
            told = (name, word, hosts, reason, _moment(start), submitted_s, "".join(command))
            rows.append(SlurmRow(match[1], component, *told))
    return rows


def _moment(text: str) -> str:
    """Write a time, which Slurm tells in seconds, for people; as it is if Slurm has none to tell."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(int(text))) if text.isdecimal() else text


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = [re.sub(r"^\w+: error: ", "", line.strip()) for line in done.stderr.splitlines()]
    return "; ".join(filter(None, lines)) or f"status {done.returncode}"


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs; times are told in seconds since 1970, whatever the users' settings."""
    environment = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            timeout=QUERY_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise SchedulerError(
            f"there is no {command[0]} on this machine; run this on a login node of the cluster, with Slurm's "
            "programs on PATH"
        ) from None
    except subprocess.TimeoutExpired:
        raise ControllerError(
            f"Slurm's controller (slurmctld) does not answer: {command[0]} waited {QUERY_TIMEOUT_S} s"
        ) from None
