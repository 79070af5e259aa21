"""This machine, as Papilio's own scheduler of TorchX: jobs that go on without a terminal and are found again.

TorchX's local_cwd lives in the process that submits: no other can ask for status, read logs, or cancel. Here each job
has a supervisor of its own (launch/schedulers/local/supervisor.py), and its folder says the rest.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from torchx import specs
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse, Scheduler, Stream, StructuredOpts
from torchx.specs import AppState

from papilio.launch.schedulers.errors import RequestError, SchedulerError
from papilio.launch.schedulers.following import follow_file
from papilio.launch.schedulers.job_folder import (
    Event,
    JobRecord,
    find_record,
    host_logs,
    last_event,
    make_folder,
    meaning_of,
    new_folder,
    read_events,
    read_records,
    why_unreadable,
    write_record,
)
from papilio.launch.schedulers.local.supervisor import CANCELLED, PID, PROCESSES, is_supervised
from papilio.trainer.elastic.bootstrap import module_command

START_TIMEOUT_S = 20.0
POLL_S = 0.02
# As TorchX's local schedulers have it.
HEAD_NODE = "TORCHX_RANK0_HOST"


@dataclass
class LocalSettings(StructuredOpts):  # type: ignore[misc]
    """What `papilio launch -s local_cwd -cfg key=value,...` takes."""

    jobs_dir: str = "jobs"
    """Where the job's folder is made, with the logs of its hosts."""


@dataclass
class LocalRequest:
    """A job that was not started yet: what each of its hosts runs, all on this machine."""

    folder: Path
    role: specs.Role
    name: str
    processes: list[dict[str, Any]]

    def __str__(self) -> str:
        return json.dumps({"folder": str(self.folder), "hosts": self.processes}, indent=1)


class LocalJobs(Scheduler[LocalSettings]):  # type: ignore[misc]
    """Starts the hosts of a job as processes here."""

    def __init__(self, session_name: str, **parameters: Any) -> None:
        """TorchX gives the session's name, and parameters that other schedulers take."""
        super().__init__("local_cwd", session_name)

    def _run_opts(self) -> specs.runopts:
        return LocalSettings.as_runopts()

    def _submit_dryrun(self, app: specs.AppDef, cfg: LocalSettings) -> specs.AppDryRunInfo[LocalRequest, LocalSettings]:
        if len(app.roles) != 1:
            raise SchedulerError(
                f"on local_cwd a job has one role; {app.name} has {len(app.roles)}: start each by itself"
            )
        role = app.roles[0]
        if role.mounts:
            raise RequestError(
                f"local_cwd starts no containers, so the job's {len(role.mounts)} mount(s) ({role.mounts[0]}) would be "
                "missing: give the paths of this machine, without --mounts"
            )
        folder = new_folder(cfg.jobs_dir, app.name)
        processes = []
        for host in range(role.num_replicas):
            values = specs.macros.Values(img_root="", app_id=folder.name, replica_id=str(host), rank0_env=HEAD_NODE)
            resolved = values.apply(role)
            environment = {"PYTHONUNBUFFERED": "1", HEAD_NODE: "localhost", **resolved.env}
            processes.append({"command": [resolved.entrypoint, *resolved.args], "environment": environment})
        return specs.AppDryRunInfo(LocalRequest(folder, role, app.name, processes), str)

    def schedule(self, dryrun_info: specs.AppDryRunInfo[LocalRequest, LocalSettings]) -> str:
        """Make the job's folder and start its supervisor.

        Raises:
            SchedulerError: the supervisor does not come up.
        """
        request = dryrun_info.request
        make_folder(request.folder)
        plan = {"max_retries": request.role.max_retries, "hosts": request.processes}
        (request.folder / PROCESSES).write_text(json.dumps(plan, indent=1), encoding="utf-8")
        with (request.folder / "job.log").open("ab") as log:
            supervisor = subprocess.Popen(
                module_command("papilio.launch.schedulers.local.supervisor", str(request.folder)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        _wait_for_start(request.folder, supervisor)
        write_record(
            JobRecord(
                scheduler="local_cwd",
                app_id=request.folder.name,
                name=request.name,
                role=request.role.name,
                num_hosts=request.role.num_replicas,
                command=tuple(sys.argv),
                folder=str(request.folder),
                submitted_s=time.time(),
                submitted_on=socket.gethostname(),
                submitted_from=str(Path.cwd()),
                max_retries=request.role.max_retries,
            )
        )
        return str(request.folder.name)

    def _cancel_existing(self, app_id: str) -> None:
        record = find_record("local_cwd", app_id)
        if record is not None and (where := _elsewhere(record)) is not None:
            raise SchedulerError(f"{record.handle} was not cancelled: {where}")
        if record is not None and is_supervised(record.folder):
            os.kill(int(Path(record.folder, PID).read_text().split()[0]), signal.SIGTERM)

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Tell the state of a job from its folder and its supervisor."""
        record = find_record("local_cwd", app_id)
        if record is None:
            return None
        events = read_events(record.folder)
        begun = last_event(events, "begins")
        state, message = _state(record, events)
        attempt = begun.attempt if begun is not None else 1
        replicas = [
            specs.ReplicaStatus(
                id=host, role=record.role, state=_host_state(record, host, state, attempt), hostname=record.submitted_on
            )
            for host in range(record.num_hosts)
        ]
        return DescribeAppResponse(
            app_id=app_id,
            state=state,
            num_restarts=attempt - 1,
            msg=message,
            metadata={"folder": record.folder},
            roles=[specs.Role(name=record.role, image="", num_replicas=record.num_hosts)],
            roles_statuses=[specs.RoleStatus(record.role, replicas)],
        )

    def list(self, cfg: Mapping[str, Any] | None = None) -> list[ListAppResponse]:
        """Return the jobs that this user started here."""
        return [
            ListAppResponse(app_id=record.app_id, state=_state(record, read_events(record.folder))[0], name=record.name)
            for record in read_records()
            if record.scheduler == "local_cwd"
        ]

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
        """Return the lines of host k, of all attempts, as they come."""
        record = find_record("local_cwd", app_id)
        if record is None:
            raise SchedulerError(f"there is no local job {app_id}; `papilio list` lists them")
        folder = record.folder
        lines = follow_file(lambda: host_logs(folder).get(k), lambda: should_tail and is_supervised(folder))
        return lines if regex is None else (line for line in lines if re.search(regex, line))

    def log_paths(self, app_id: str, streams: Stream | None = None) -> dict[int, Path]:
        """Return the log files of a job's hosts that are there now, by host."""
        record = find_record("local_cwd", app_id)
        return host_logs(record.folder) if record is not None else {}


def _wait_for_start(folder: Path, supervisor: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not read_events(str(folder)):
        if supervisor.poll() is not None or time.monotonic() > deadline_s:
            last = (folder / "job.log").read_text(errors="replace").strip().splitlines()[-1:]
            raise SchedulerError(f"the job's supervisor did not start: {' '.join(last) or 'no message'}; see {folder}")
        time.sleep(POLL_S)


def _elsewhere(record: JobRecord) -> str | None:
    """Say that a job's processes are not here, if they are not: folders and the index may be on a shared disk."""
    if record.submitted_on == socket.gethostname():
        return None
    return f"it was started on {record.submitted_on}, and this is {socket.gethostname()}: ask there"


def _state(record: JobRecord, events: list[Event]) -> tuple[AppState, str]:
    unreadable = why_unreadable(record.folder)
    if unreadable is not None:
        return AppState.UNKNOWN, unreadable
    if is_supervised(record.folder):
        return AppState.RUNNING, "RUNNING"
    last = last_event(events, "begins", "ended", "retried")
    if last is not None and last.what == "ended":
        return _ending(last.details[0], is_cancelled=last_event(events, CANCELLED) is not None)
    where = _elsewhere(record)
    if where is not None:
        return AppState.UNKNOWN, where
    return AppState.FAILED, "its supervisor was killed, or this machine was started anew; the ranks have ended"


def _ending(status: str, *, is_cancelled: bool) -> tuple[AppState, str]:
    if status == "0":
        return AppState.SUCCEEDED, "status 0"
    if is_cancelled:
        return AppState.CANCELLED, f"cancelled, {meaning_of(status)}"
    return AppState.FAILED, meaning_of(status)


def _host_state(record: JobRecord, host: int, state: AppState, attempt: int) -> AppState:
    ended = last_event(read_events(record.folder, f"host_{host}.events"), "ended")
    if state == AppState.CANCELLED or ended is None or ended.attempt != attempt:
        return state
    return AppState.SUCCEEDED if ended.details[0] == "0" else AppState.FAILED
