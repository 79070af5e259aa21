"""What is known of a job: its handle, its state, its folder, its first error; for `papilio status` and `logs`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchx import specs
from torchx.runner import Runner
from torchx.schedulers.api import Stream
from torchx.specs import AppState, AppStatus

from papilio.launch.compat.torchx_internals import scheduler_of
from papilio.launch.jobs.first_error import find_first_error, slurm_error
from papilio.launch.jobs.live_text import table
from papilio.launch.schedulers.errors import SchedulerError
from papilio.launch.schedulers.job_folder import (
    JobRecord,
    find_record,
    host_logs,
    last_event,
    read_events,
    read_records,
)
from papilio.launch.schedulers.runner import SCHEDULERS
from papilio.launch.schedulers.slurm.identity import record_here
from papilio.launch.usage import UsageError

# What `papilio status` leaves with; 2 is a wrong command line.
STATUS_CODES: Mapping[AppState, int] = {
    AppState.SUBMITTED: 0,
    AppState.PENDING: 0,
    AppState.RUNNING: 0,
    AppState.SUCCEEDED: 0,
    AppState.FAILED: 1,
    AppState.CANCELLED: 4,
}
UNKNOWN_CODE = 3
KUBERNETES_ID = re.compile(r"[a-z0-9-]+:[a-z0-9.-]+", re.ASCII)
# What training prints when it begins (trainer/train.py), in the log of the first host.
RUN_FOLDER = re.compile(r"^(?:\[0\]:)?run folder: (.+)$")


def handle_of(word: str | None) -> str:
    """Return the handle that a word means: itself, the id of a job, the name of its folder, or the newest of this one.

    Raises:
        UsageError: it means none.
    """
    return find_job(word)[0]


def find_job(word: str | None) -> tuple[str, bool]:
    """Return the handle that a word means, and whether the word is that job's own and no other's.

    A name, or no word at all, means the newest job that was started from this folder, or else from any.

    Raises:
        UsageError: it means none.
    """
    if word is not None and "://" in word:
        # Numbers come again, other schedulers' names do not.
        return word, _parts(word)[0] != "slurm" or record_of(word) is not None
    records = read_records()
    exact = [record for record in records if word in (record.app_id, Path(record.folder).name)]
    if exact:
        handle = exact[-1].handle
        return handle, len({record.handle for record in exact}) == 1
    named = [record for record in records if word in (None, record.name)]
    if named:
        return next(reversed(list(filter(is_from_here, named)) or named)).handle, False
    if word is None:
        raise UsageError("no job was started from this machine; give a job, as in slurm://papilio/12")
    if word.isascii() and word.isdecimal():
        return f"slurm://papilio/{word}", False
    raise UsageError(f"there is no job {word}; `papilio list` lists them")


def is_from_here(record: JobRecord) -> bool:
    """Whether a job was started from the folder in which this process is."""
    return os.path.realpath(record.submitted_from) == os.path.realpath(os.getcwd())


def status_of(runner: Runner, handle: str) -> AppStatus:
    """Ask the scheduler for a job's state.

    Raises:
        UsageError: Papilio has no such scheduler.
        SchedulerError: it does not know the job.
    """
    scheduler, app_id = _parts(handle)
    if scheduler == "slurm" and not (app_id.isascii() and app_id.isdecimal()):
        raise UsageError(f"{handle}: a job on Slurm has a number, as in slurm://papilio/12")
    if scheduler == "kubernetes" and KUBERNETES_ID.fullmatch(app_id) is None:
        raise UsageError(
            f"{handle}: a job on Kubernetes is NAMESPACE:NAME, as in kubernetes://papilio/default:train-x1"
        )
    if scheduler not in SCHEDULERS:
        raise UsageError(f"{handle}: Papilio has no scheduler {scheduler}; it has {', '.join(SCHEDULERS)}")
    status = runner.status(handle)
    if status is None:
        raise SchedulerError(
            f"{scheduler} knows no job {handle}: it ended long ago, or belongs to another cluster or user; "
            "`papilio list` lists those that are known"
        )
    return status


def _parts(handle: str) -> tuple[str, str]:
    """Part a handle into scheduler and id.

    Raises:
        UsageError: it is none.
    """
    try:
        scheduler, _, app_id = specs.parse_app_handle(handle)
    except specs.MalformedAppHandleException:
        raise UsageError(f"{handle} is no job; a handle is as slurm://papilio/12, `papilio list` lists them") from None
    return scheduler, app_id


def record_of(handle: str) -> JobRecord | None:
    """Return what was noted when a job was started, if it was from here."""
    scheduler, app_id = _parts(handle)
    return record_here(app_id) if scheduler == "slurm" else find_record(scheduler, app_id)


def log_paths(runner: Runner, handle: str, stream: Stream | None = None) -> dict[int, Path]:
    """Return the log files of a job's hosts, by host."""
    scheduler, _, app_id = specs.parse_app_handle(handle)
    find = getattr(scheduler_of(runner, scheduler), "log_paths", None)
    paths: dict[int, Path] = find(app_id, stream) if find is not None else {}
    return paths


def first_error(runner: Runner, handle: str) -> str | None:
    """Agents and ranks complain on stderr, where that is a file of its own."""
    record = record_of(handle)
    return find_first_error(record.folder if record else None, log_paths(runner, handle, Stream.STDERR))


def run_folder_of(handle: str) -> str | None:
    """Return the run folder that the latest attempt of a job printed, None if it did not, or is not in a log here."""
    record = record_of(handle)
    log = host_logs(record.folder).get(0) if record is not None else None
    if record is None or log is None:
        return None
    found = None
    with suppress(OSError), log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            match = RUN_FOLDER.match(line)
            found = match[1].strip() if match else found
    return found if found is None or "://" in found else str(Path(record.submitted_from, found))


def status_lines(
    runner: Runner, handle: str, status: AppStatus, picture: Sequence[str] = (), told: str | None = None
) -> Iterator[str]:
    """Tell of a job: its state, its hosts, the picture of its ranks, and last, if it failed, the first error.

    `told` is what the ranks' view says of it, should the logs not say why.
    """
    record = record_of(handle)
    name = f"  {record.name}" if record else ""
    again = f", attempt {status.num_restarts + 1}" if status.num_restarts > 0 else ""
    yield f"{handle}{name}  {status.state.name}{again}" + (f"  ({status.msg})" if status.msg else "")
    hosts = [replica for role in status.roles for replica in sorted(role.replicas, key=lambda r: r.id)]
    if not picture or any(host.state != status.state for host in hosts):
        rows = [["host", "name", "state"], *([str(r.id), r.hostname or "-", r.state.name] for r in hosts)]
        yield from (f"  {line}" for line in table(rows))
    if record is not None:
        yield f"  logs: {record.folder}"
    yield from ("", *picture) if picture else ()
    if status.state == AppState.RUNNING and record is not None and (reason := slurm_error(record.folder)):
        yield f"  {reason}"
    if status.state == AppState.FAILED:
        error = first_error(runner, handle) or told
        yield f"  first error: {error}" if error else "  the logs do not say why"


def status_tree(runner: Runner, handle: str, status: AppStatus) -> dict[str, Any]:
    """Return what `status_lines` tells as plain values."""
    record = record_of(handle)
    hosts = [
        {"role": role.role, "host": replica.id, "name": replica.hostname, "state": replica.state.name}
        for role in status.roles
        for replica in role.replicas
    ]
    tree: dict[str, Any] = {"job": handle, "state": status.state.name, "message": status.msg, "hosts": hosts}
    tree["attempt"] = max(status.num_restarts, 0) + 1
    tree["exit_status"] = exit_status(handle, status) if status.is_terminal() else None
    tree["folder"] = record.folder if record else None
    if status.state == AppState.FAILED:
        tree["first_error"] = first_error(runner, handle)
    if status.state == AppState.RUNNING and record is not None:
        tree["slurm_error"] = slurm_error(record.folder)
    return tree


def exit_status(handle: str, status: AppStatus) -> int:
    """Return the status of the job's own command where it is known, or else 0 or 1."""
    if status.state == AppState.SUCCEEDED:
        return 0
    record = record_of(handle)
    ended = last_event(read_events(record.folder), "ended", "begins") if record else None
    is_told = ended is not None and ended.what == "ended" and ended.details[0].isdecimal()
    return int(ended.details[0]) or 1 if ended is not None and is_told else 1
