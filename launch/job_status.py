"""What is known of a job: its handle, its state, its folder, its first error; for `papilio status` and `logs`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torchx import specs
from torchx.runner import Runner
from torchx.schedulers.api import Stream
from torchx.specs import AppState, AppStatus

from launch.first_error import find_first_error
from launch.live_text import table
from launch.schedulers.errors import SchedulerError
from launch.schedulers.job_folder import JobRecord, find_record, host_logs, last_event, read_events, read_records
from launch.schedulers.runner import SCHEDULERS, scheduler_of
from launch.usage import UsageError

# What training prints when it begins (trainer/train.py), in the log of the first host.
RUN_FOLDER = re.compile(r"^(?:\[0\]:)?run folder: (.+)$")


def handle_of(word: str | None) -> str:
    """Return the handle that a word means: itself, the id of a job, the name of its folder, or the newest.

    Raises:
        UsageError: it means none.
    """
    if word is not None and "://" in word:
        return word
    records = read_records()
    if word is None:
        if not records:
            raise UsageError("no job was started from this machine; give a job, as in slurm://papilio/12")
        return records[-1].handle
    found = [record for record in records if word in (record.app_id, record.name) or word == Path(record.folder).name]
    if found:
        return found[-1].handle
    if word.isdigit():
        return f"slurm://papilio/{word}"
    raise UsageError(f"there is no job {word}; `papilio list` lists them")


def status_of(runner: Runner, handle: str) -> AppStatus:
    """Ask the scheduler for a job's state.

    Raises:
        UsageError: Papilio has no such scheduler.
        SchedulerError: it does not know the job.
    """
    scheduler = specs.parse_app_handle(handle)[0]
    if scheduler not in SCHEDULERS:
        raise UsageError(f"{handle}: Papilio has no scheduler {scheduler}; it has {', '.join(SCHEDULERS)}")
    status = runner.status(handle)
    if status is None:
        raise SchedulerError(
            f"{scheduler} knows no job {handle}: it ended long ago, or belongs to another cluster or user; "
            "`papilio list` lists those that are known"
        )
    return status


def record_of(handle: str) -> JobRecord | None:
    """Return what was noted when a job was started, if it was from here."""
    scheduler, _, app_id = specs.parse_app_handle(handle)
    return find_record(scheduler, app_id)


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
    with log.open(encoding="utf-8", errors="replace") as lines:
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
    return tree


def exit_status(handle: str, status: AppStatus) -> int:
    """Return the status of the job's own command where it is known, or else 0 or 1."""
    if status.state == AppState.SUCCEEDED:
        return 0
    record = record_of(handle)
    ended = last_event(read_events(record.folder), "ended", "begins") if record else None
    return int(ended.details[0]) or 1 if ended is not None and ended.what == "ended" else 1
