"""Slurm, as Papilio's own scheduler of TorchX: jobs that are found again, with or without an accounting database.

It also tells of jobs that TorchX's own slurm scheduler submitted (`torchx run -s slurm papilio.train`).
"""

from __future__ import annotations

import re
import shlex
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from torchx import specs
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse, Scheduler, Stream, StructuredOpts
from torchx.specs import AppState

from launch.schedulers import slurm_queries as queries
from launch.schedulers.errors import SchedulerError
from launch.schedulers.following import follow_file
from launch.schedulers.job_folder import (
    JobRecord,
    find_record,
    host_logs,
    new_folder,
    read_records,
    write_record,
)
from launch.schedulers.slurm_queries import SlurmRow
from launch.schedulers.slurm_scripts import SlurmScripts, render, resolve_role
from launch.schedulers.slurm_states import STATES, describe_components, describe_forgotten, describe_job, together

# Below this a partition's memory is not configured, and Slurm refuses jobs that ask for any.
LEAST_PARTITION_MEMORY_MB = 1_000
# A job with a time limit gets SIGTERM so long before it that its ranks can save: the grace of the component, and this.
MARGIN_S = 30
DEFAULT_GRACE_S = 30


@dataclass
class SlurmSettings(StructuredOpts):  # type: ignore[misc]
    """What `papilio launch -s slurm -cfg key=value,...` takes."""

    partition: str | None = None
    """Partition to run in (default: the cluster's)."""

    time: str | None = None
    """Time limit as Slurm writes it, e.g. 60 (minutes) or 1-12:00:00; shortly before, the ranks save and the job is
    requeued."""

    account: str | None = None
    """Account to charge."""

    qos: str | None = None
    """Quality of service."""

    constraint: str | None = None
    """Features that the hosts must have."""

    exclude: str | None = None
    """Hosts not to use, e.g. n7."""

    reservation: str | None = None
    """Reservation to run in."""

    comment: str | None = None
    """Comment on the job."""

    mail_user: str | None = field(default=None, metadata={"cfg_key": "mail-user"})
    """Whom to mail."""

    mail_type: str | None = field(default=None, metadata={"cfg_key": "mail-type"})
    """On which events to mail."""

    jobs_dir: str = "jobs"
    """Where the job's folder is made, with its scripts and the logs of its hosts; all hosts must see it."""


@dataclass
class SlurmRequest:
    """A job that was not submitted yet."""

    folder: Path
    scripts: SlurmScripts
    role: specs.Role
    name: str
    command: tuple[str, ...]

    def __str__(self) -> str:
        return f"# {self.folder}/job.sh\n{self.scripts.job}\n# {self.folder}/host.sh\n{self.scripts.host}"


class SlurmJobs(Scheduler[SlurmSettings]):  # type: ignore[misc]
    """Submits plain Slurm jobs of one role, one task a host, and tells of all jobs."""

    def __init__(self, session_name: str, **parameters: Any) -> None:
        """TorchX gives the session's name, and parameters that other schedulers take."""
        super().__init__("slurm", session_name)

    def _run_opts(self) -> specs.runopts:
        return SlurmSettings.as_runopts()

    def _submit_dryrun(self, app: specs.AppDef, cfg: SlurmSettings) -> specs.AppDryRunInfo[SlurmRequest, SlurmSettings]:
        role = _only_role(app)
        folder = new_folder(cfg.jobs_dir, app.name)
        command = ("papilio", *sys.argv[1:]) if Path(sys.argv[0]).name in ("papilio", "cli.py") else tuple(sys.argv)
        scripts = render(
            resolve_role(role),
            title=shlex.join(command),
            folder=str(folder),
            sbatch_options=[*_sbatch_options(app.name, role, cfg), f"--output={folder}/job.log"],
        )
        return specs.AppDryRunInfo(SlurmRequest(folder, scripts, role, app.name, command), str)

    def schedule(self, dryrun_info: specs.AppDryRunInfo[SlurmRequest, SlurmSettings]) -> str:
        """Make the job's folder and submit the job.

        Raises:
            SchedulerError: Slurm refuses it.
        """
        request = dryrun_info.request
        request.folder.mkdir(parents=True)
        for name, text in (("job.sh", request.scripts.job), ("host.sh", request.scripts.host)):
            (request.folder / name).write_text(text, encoding="utf-8")
        app_id = queries.submit(f"{request.folder}/job.sh")
        write_record(
            JobRecord(
                scheduler="slurm",
                app_id=app_id,
                name=request.name,
                role=request.role.name,
                num_hosts=request.role.num_replicas,
                command=request.command,
                folder=str(request.folder),
                submitted_s=time.time(),
                submitted_on=socket.gethostname(),
                submitted_from=str(Path.cwd()),
                max_retries=request.role.max_retries,
            )
        )
        return app_id

    def _cancel_existing(self, app_id: str) -> None:
        queries.cancel_job(app_id)

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Tell the state of a job: as Slurm knows it, or else its database, or else the job's folder."""
        rows, record = queries.query_job(app_id), find_record("slurm", app_id)
        if record is not None and rows and rows[0].name != record.name:
            record = None  # of another cluster, where the ids began anew
        if not rows:
            return describe_forgotten(record) if record is not None else None
        if rows[0].component is not None or record is None:
            return describe_components(app_id, rows)
        return describe_job(rows[0], record)

    def list(self, cfg: Mapping[str, Any] | None = None) -> list[ListAppResponse]:
        """Return this user's jobs that Slurm remembers, a heterogeneous one as one, after those it has forgotten."""
        jobs: dict[str, list[SlurmRow]] = {}
        for row in queries.query_jobs():
            jobs.setdefault(row.job_id, []).append(row)
        forgotten = [record for record in read_records() if record.scheduler == "slurm" and record.app_id not in jobs]
        responses = [
            ListAppResponse(app_id=record.app_id, state=describe_forgotten(record).state, name=record.name)
            for record in forgotten
        ]
        for job_id, rows in jobs.items():
            state = together([STATES.get(row.state, AppState.UNKNOWN) for row in rows])
            name = rows[0].name if rows[0].component is None else rows[0].name.rpartition("-")[0]
            responses.append(ListAppResponse(app_id=job_id, state=state, name=name))
        return responses

    def log_iter(
        self,
        app_id: str,
        role_name: str,
        k: int = 0,
        regex: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        should_tail: bool = False,
        streams: Stream | None = None,
    ) -> Iterable[str]:
        """Return the lines of host k, of all attempts, as they come.

        Raises:
            SchedulerError: the log is not on this machine.
        """
        path = self.log_paths(app_id, streams).get(k)
        if path is None and not should_tail:
            raise SchedulerError(f"slurm job {app_id} has no log of host {k} yet")
        lines = follow_file(
            lambda: self.log_paths(app_id, streams).get(k), lambda: should_tail and not self._has_ended(app_id)
        )
        return lines if regex is None else (line for line in lines if re.search(regex, line))

    def log_paths(self, app_id: str, streams: Stream | None = None) -> dict[int, Path]:
        """Return the log files of a job's hosts that are there now, by host."""
        record = find_record("slurm", app_id)
        if record is not None and not self.is_heterogeneous(app_id):
            return host_logs(record.folder)
        folder = Path(queries.show_job(app_id).get("WorkDir", "."))
        ending = "err" if streams == Stream.STDERR else "out"
        found = {path: re.search(r"-(\d+)\.\w+$", path.name) for path in folder.glob(f"slurm-{app_id}-*.{ending}")}
        return dict(sorted((int(match[1]), path) for path, match in found.items() if match is not None))

    def log_streams(self, app_id: str) -> tuple[Stream | None, ...]:
        """Return what to ask `log_iter` for to get everything: TorchX's own jobs have a file for each stream."""
        return (Stream.STDOUT, Stream.STDERR) if self.is_heterogeneous(app_id) else (None,)

    def is_heterogeneous(self, app_id: str) -> bool:
        """Whether TorchX's own scheduler submitted the job, as one component for each replica."""
        rows = queries.query_job(app_id)
        return bool(rows) and rows[0].component is not None

    def _has_ended(self, app_id: str) -> bool:
        description = self.describe(app_id)
        return description is None or specs.is_terminal(description.state)


def _only_role(app: specs.AppDef) -> specs.Role:
    """Return the role of a job that Slurm can run as it is asked.

    Raises:
        SchedulerError: a part of it would be dropped.
    """
    if len(app.roles) != 1:
        names = ", ".join(role.name for role in app.roles)
        raise SchedulerError(
            f"on Slurm a job has one role; {app.name} has {len(app.roles)} ({names}): start each by itself"
        )
    role: specs.Role = app.roles[0]
    if role.mounts:
        raise SchedulerError(
            f"Slurm starts no containers, so the job's {len(role.mounts)} mount(s) ({role.mounts[0]}) would be "
            "missing: give the paths that the hosts have, without --mounts"
        )
    return role


def _sbatch_options(name: str, role: specs.Role, cfg: SlurmSettings) -> list[str]:
    fewest = role.min_replicas or role.num_replicas
    hosts = str(fewest) if fewest == role.num_replicas else f"{fewest}-{role.num_replicas}"
    options = [f"--job-name={name}", f"--nodes={hosts}", "--requeue", "--open-mode=append"]
    # With a number of tasks Slurm would give an elastic job its fewest hosts; a lost one must not end it.
    options.append("--no-kill" if fewest < role.num_replicas else "--ntasks-per-node=1")
    if role.resource.cpu > 0:
        options.append(f"--cpus-per-task={role.resource.cpu}")
    if role.resource.gpu > 0:
        options.append(f"--gres=gpu:{role.resource.gpu}")
    available_mb = queries.partition_memory_mb(cfg.partition)
    if role.resource.memMB > 0 and (available_mb is None or available_mb > LEAST_PARTITION_MEMORY_MB):
        options.append(f"--mem={role.resource.memMB}M")
    if cfg.time is not None:
        grace_s = int(role.env.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", DEFAULT_GRACE_S))
        options += [f"--time={cfg.time}", f"--signal=TERM@{grace_s + MARGIN_S}"]
    given = {
        key: cfg[key] for key in ("partition", "account", "qos", "constraint", "exclude", "reservation", "comment")
    }
    given |= {"mail-user": cfg.mail_user, "mail-type": cfg.mail_type}
    return options + [f"--{key}={shlex.quote(value)}" for key, value in given.items() if value is not None]
