"""Slurm, as Papilio's own scheduler of TorchX: jobs that are found again, with or without an accounting database.

It also tells of jobs that TorchX's own slurm scheduler submitted (`torchx run -s slurm papilio.train`).
"""

from __future__ import annotations

import re
import shlex
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from torchx import specs
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse, Scheduler, Stream
from torchx.specs import AppState

from papilio.launch.schedulers.errors import RequestError, SchedulerError
from papilio.launch.schedulers.following import follow_file
from papilio.launch.schedulers.job_folder import (
    JobRecord,
    ListedJob,
    host_logs,
    make_folder,
    new_folder,
    note_cancelled,
    read_records,
    write_record,
)
from papilio.launch.schedulers.slurm import queries
from papilio.launch.schedulers.slurm.identity import is_job, other_cluster, record_here
from papilio.launch.schedulers.slurm.queries import ControllerError, SlurmRow
from papilio.launch.schedulers.slurm.sbatch_options import SlurmSettings, limit_s, sbatch_options
from papilio.launch.schedulers.slurm.scripts import SlurmScripts, render, resolve_role
from papilio.launch.schedulers.slurm.states import (
    FORGOTTEN,
    STATES,
    describe_by_folder,
    describe_components,
    describe_job,
    together,
)


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
        self.notice: str | None = None

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
            sbatch_options=sbatch_options(app.name, role, cfg, folder),
            has_time_limit=limit_s(cfg) is not None,
        )
        return specs.AppDryRunInfo(SlurmRequest(folder, scripts, role, app.name, command), str)

    def schedule(self, dryrun_info: specs.AppDryRunInfo[SlurmRequest, SlurmSettings]) -> str:
        """Make the job's folder and submit the job.

        Raises:
            SchedulerError: Slurm refuses it.
        """
        request = dryrun_info.request
        make_folder(request.folder)
        for name, text in (("job.sh", request.scripts.job), ("host.sh", request.scripts.host)):
            (request.folder / name).write_text(text, encoding="utf-8")
        app_id = queries.submit(f"{request.folder}/job.sh")
        cluster, accepted_s = _accepted(app_id)
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
                cluster=cluster,
                accepted_s=accepted_s,
            )
        )
        return app_id

    def _cancel_existing(self, app_id: str) -> None:
        """Cancel a job, and remember that it was cancelled; not another one that has its number now."""
        record = record_here(app_id)
        if record is not None:
            why = other_cluster(record) or _taken(queries.query_job(app_id), record)
            if why is not None:
                raise SchedulerError(f"job {app_id} of {record.folder} was not cancelled: {why}")
        queries.cancel_job(app_id)
        if record is not None:
            with suppress(OSError):  # the folder is on a disk that is full; the job has been cancelled
                note_cancelled(record)

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Tell the state of a job: as Slurm knows it, or else its database, or else the job's folder."""
        record = record_here(app_id)
        try:
            rows = queries.query_job(app_id)
        except ControllerError as error:
            if record is None:
                raise
            return describe_by_folder(record, str(error))
        if rows and (record is None or rows[0].component is not None):
            return describe_components(app_id, rows)
        if record is None:
            return None
        if rows and is_job(rows[0], record):
            return describe_job(rows[0], record)
        return describe_by_folder(record, _taken(rows, record) or other_cluster(record) or FORGOTTEN)

    def list(self, cfg: Mapping[str, Any] | None = None) -> list[ListAppResponse]:
        """Return this user's jobs that Slurm remembers, a heterogeneous one as one, after those it has forgotten.

        Where slurmctld does not answer, `notice` says so, and each job's folder what it knows.
        """
        jobs: dict[str, list[SlurmRow]] = {}
        forgotten = FORGOTTEN
        self.notice = None
        try:
            for row in queries.query_jobs():
                jobs.setdefault(row.job_id, []).append(row)
        except ControllerError as error:
            self.notice = forgotten = str(error)
        known: dict[str, JobRecord] = {}
        responses: list[ListAppResponse] = []
        for record in (record for record in read_records() if record.scheduler == "slurm"):
            if record.app_id in jobs and is_job(jobs[record.app_id][0], record):
                known[record.app_id] = record
            else:
                state = describe_by_folder(record, forgotten).state
                responses.append(ListedJob(app_id=record.app_id, state=state, name=record.name, record=record))
        for job_id, rows in jobs.items():
            state = together([STATES.get(row.state, AppState.UNKNOWN) for row in rows])
            name = rows[0].name if rows[0].component is None else rows[0].name.rpartition("-")[0]
            responses.append(ListedJob(app_id=job_id, state=state, name=name, record=known.get(job_id)))
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
        folder = self._log_folder(app_id)
        if not should_tail and k not in _logs(folder, app_id, streams):
            raise SchedulerError(f"slurm job {app_id} has no log of host {k} yet")
        lines = follow_file(
            lambda: _logs(folder, app_id, streams).get(k), lambda: should_tail and not self._has_ended(app_id)
        )
        return lines if regex is None else (line for line in lines if re.search(regex, line))

    def log_paths(self, app_id: str, streams: Stream | None = None) -> dict[int, Path]:
        """Return the log files of a job's hosts that are there now, by host."""
        return _logs(self._log_folder(app_id), app_id, streams)

    def _log_folder(self, app_id: str) -> JobRecord | Path:
        """Return the record of a job of ours, or else the folder in which TorchX's own writes; asks Slurm only then."""
        record = record_here(app_id)
        if record is not None and not self.is_heterogeneous(app_id):
            return record
        return Path(queries.show_job(app_id).get("WorkDir", "."))

    def log_streams(self, app_id: str) -> tuple[Stream | None, ...]:
        """Return what to ask `log_iter` for to get everything: TorchX's own jobs have a file for each stream."""
        return (Stream.STDOUT, Stream.STDERR) if self.is_heterogeneous(app_id) else (None,)

    def is_heterogeneous(self, app_id: str) -> bool:
        """Whether TorchX's own scheduler submitted the job, as one component for each replica."""
        try:
            rows = queries.query_job(app_id)
        except ControllerError:
            return False
        return bool(rows) and rows[0].component is not None

    def _has_ended(self, app_id: str) -> bool:
        description = self.describe(app_id)
        return description is None or specs.is_terminal(description.state)


def _logs(place: JobRecord | Path, app_id: str, streams: Stream | None) -> dict[int, Path]:
    if isinstance(place, JobRecord):
        return host_logs(place.folder)
    ending = "err" if streams == Stream.STDERR else "out"
    found = {path: re.search(r"-(\d+)\.\w+$", path.name) for path in place.glob(f"slurm-{app_id}-*.{ending}")}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match is not None))


def _accepted(app_id: str) -> tuple[str, float]:
    """Return the cluster that accepted a job, and when; they tell it from another of its number."""
    try:
        rows = queries.query_job(app_id)
        return queries.cluster_name(), rows[0].submitted_s if rows else 0.0
    except SchedulerError:  # the job is submitted all the same
        return "", 0.0


def _taken(rows: Sequence[SlurmRow], record: JobRecord) -> str | None:
    """Say which job has the number now that was the recorded job's; None if it is this one, or nobody's."""
    if not rows or is_job(rows[0], record):
        return None
    return f"Slurm's job {record.app_id} is another one here, {rows[0].name!r}"


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
        raise RequestError(
            f"Slurm starts no containers, so the job's {len(role.mounts)} mount(s) ({role.mounts[0]}) would be "
            "missing: give the paths that the hosts have, without --mounts"
        )
    return role
