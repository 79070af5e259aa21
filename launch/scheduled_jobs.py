"""`papilio launch`, `status`, `logs`, `cancel`, `list`: jobs on Slurm, Kubernetes or this machine, through TorchX."""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchx import specs
from torchx.runner import Runner
from torchx.schedulers.api import Stream
from torchx.specs import AppState, AppStatus

from launch.component_arguments import build_app
from launch.first_error import find_first_error
from launch.local_run import LinePrinter
from launch.schedulers.errors import SchedulerError
from launch.schedulers.job_folder import JobRecord, find_record, last_event, read_events, read_records
from launch.schedulers.runner import SCHEDULERS, make_runner, scheduler_of
from launch.usage import UsageError

RANK_LINE = re.compile(r"^\[\d+\]:")
POLL_S = 1.0
MAX_LISTED = 20


def run_launch(namespace: argparse.Namespace) -> int:
    """Submit a component as a job, or print what would be submitted; with --follow, show its output to its end."""
    app = build_app(namespace.component, namespace.arguments)
    with make_runner() as runner:
        settings = _settings(runner, namespace.scheduler, namespace.cfg)
        info = runner.dryrun(app, namespace.scheduler, cfg=settings)
        if namespace.dryrun:
            print(info)
            return 0
        handle = runner.schedule(info)
        print(handle, flush=True)
        record = _record(handle)
        if record is not None:
            print(f"logs and scripts: {os.path.relpath(record.folder)}", file=sys.stderr)
        if namespace.follow:
            return _follow(runner, handle)
        print(f"papilio status {handle}; papilio logs -f {handle}; papilio cancel {handle}", file=sys.stderr)
    return 0


def run_status(namespace: argparse.Namespace) -> int:
    """Print the state of a job, its hosts, and, if it failed, the first error."""
    with make_runner() as runner:
        handle = _handle(namespace.job)
        status = _status(runner, handle)
        if namespace.json:
            print(json.dumps(_status_json(runner, handle, status), indent=1))
        else:
            print("\n".join(_status_lines(runner, handle, status)))
    return 0


def run_logs(namespace: argparse.Namespace) -> int:
    """Print what the hosts of a job printed; with --follow, go on until its end and leave with its status."""
    with make_runner() as runner:
        handle = _handle(namespace.job)
        status = _status(runner, handle)
        if namespace.follow:
            return _follow(runner, handle, namespace.host)
        scheduler = specs.parse_app_handle(handle)[0]
        paths = _log_paths(runner, handle)
        if not paths and scheduler != "kubernetes":
            raise SchedulerError(f"no host of {handle} has printed anything yet; papilio status {handle} says why")
        hosts = sorted(paths) or [replica.id for role in status.roles for replica in role.replicas]
        for host in hosts if namespace.host is None else [namespace.host]:
            for stream in _log_streams(runner, handle):
                for line in runner.log_lines(handle, _role(runner, handle), host, streams=stream):
                    print(_prefixed(host, line.rstrip("\n")))
    return 0


def run_cancel(namespace: argparse.Namespace) -> int:
    """Tell a job to end; its ranks save before."""
    with make_runner() as runner:
        handle = _handle(namespace.job)
        status = _status(runner, handle)
        if status.is_terminal():
            print(f"{handle} has ended already: {status.state.name}")
            return 0
        runner.cancel(handle)
        print(f"{handle} was told to end; its ranks save first (papilio status {handle})")
    return 0


def run_list(namespace: argparse.Namespace) -> int:
    """Print this user's jobs, the newest last."""
    names = [namespace.scheduler] if namespace.scheduler else _schedulers_here()
    rows = []
    with make_runner() as runner:
        for name in names:
            submitted_s = 0.0
            for job in runner.list(name):
                record = find_record(name, job.app_id)
                # A job that another launched has no record; schedulers list theirs in order.
                submitted_s = record.submitted_s if record else submitted_s
                rows.append((submitted_s, job, record))
    rows.sort(key=lambda row: row[0])
    if namespace.json:
        print(json.dumps([_row_json(job, record) for _, job, record in rows], indent=1))
        return 0
    shown = rows if namespace.all else rows[-MAX_LISTED:]
    cells = [["job", "name", "state", "hosts", "started", "folder"], *(_row_cells(job, rec) for _, job, rec in shown)]
    print("\n".join(_table(cells)) if shown else f"no jobs (on {', '.join(names)})")
    if len(shown) < len(rows):
        print(f"{len(rows) - len(shown)} older ones: --all")
    return 0


def _settings(runner: Runner, scheduler: str, words: list[str]) -> dict[str, Any]:
    """Read the settings of a scheduler.

    Raises:
        UsageError: it has none of this name, or a word is no setting.
    """
    known = set(dict(runner.scheduler_run_opts(scheduler)))
    for word in words:
        names = {part.partition("=")[0] for part in re.split(r",(?=[^,=]*=)", word)}
        if "=" not in word or not names <= known:
            raise UsageError(f"-cfg {word}: the settings of {scheduler} are {', '.join(sorted(known))}, as key=value")
    return dict(runner.cfg_from_str(scheduler, *words))


def _handle(word: str | None) -> str:
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


def _status(runner: Runner, handle: str) -> AppStatus:
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


def _record(handle: str) -> JobRecord | None:
    scheduler, _, app_id = specs.parse_app_handle(handle)
    return find_record(scheduler, app_id)


def _role(runner: Runner, handle: str) -> str:
    app = runner.describe(handle)
    return str(app.roles[0].name) if app is not None and app.roles else "train"


def _log_paths(runner: Runner, handle: str, stream: Stream | None = None) -> dict[int, Path]:
    scheduler, _, app_id = specs.parse_app_handle(handle)
    find = getattr(scheduler_of(runner, scheduler), "log_paths", None)
    paths: dict[int, Path] = find(app_id, stream) if find is not None else {}
    return paths


def _log_streams(runner: Runner, handle: str) -> tuple[Stream | None, ...]:
    """What to ask for to get all that the hosts print: None, but where a scheduler keeps the streams apart."""
    scheduler, _, app_id = specs.parse_app_handle(handle)
    ask = getattr(scheduler_of(runner, scheduler), "log_streams", None)
    streams: tuple[Stream | None, ...] = ask(app_id) if ask is not None else (None,)
    return streams


def _first_error(runner: Runner, handle: str) -> str | None:
    """Agents and ranks complain on stderr, where that is a file of its own."""
    record = _record(handle)
    return find_first_error(record.folder if record else None, _log_paths(runner, handle, Stream.STDERR))


def _status_lines(runner: Runner, handle: str, status: AppStatus) -> Iterator[str]:
    record = _record(handle)
    name = f"  {record.name}" if record else ""
    again = f", attempt {status.num_restarts + 1}" if status.num_restarts > 0 else ""
    yield f"{handle}{name}  {status.state.name}{again}" + (f"  ({status.msg})" if status.msg else "")
    for role in status.roles:
        rows = [["host", "name", "state"]]
        rows += [[str(r.id), r.hostname or "-", r.state.name] for r in sorted(role.replicas, key=lambda r: r.id)]
        yield from (f"  {line}" for line in _table(rows))
    if status.state == AppState.FAILED:
        error = _first_error(runner, handle)
        yield f"  first error: {error}" if error else "  the logs do not say why"
    if record is not None:
        yield f"  logs: {record.folder}"


def _status_json(runner: Runner, handle: str, status: AppStatus) -> dict[str, Any]:
    record = _record(handle)
    hosts = [
        {"role": role.role, "host": replica.id, "name": replica.hostname, "state": replica.state.name}
        for role in status.roles
        for replica in role.replicas
    ]
    tree: dict[str, Any] = {"job": handle, "state": status.state.name, "message": status.msg, "hosts": hosts}
    tree["attempt"] = max(status.num_restarts, 0) + 1
    tree["exit_status"] = _exit_status(handle, status) if status.is_terminal() else None
    tree["folder"] = record.folder if record else None
    if status.state == AppState.FAILED:
        tree["first_error"] = _first_error(runner, handle)
    return tree


def _follow(runner: Runner, handle: str, only_host: int | None = None) -> int:
    """Print the output of all hosts, or of one, as it comes; return the job's exit status at its end."""
    printer = LinePrinter(sys.stdout, shutil.get_terminal_size().columns if sys.stdout.isatty() else None)
    status = _status(runner, handle)
    hosts = [replica.id for role in status.roles for replica in role.replicas] or [0]
    lines: queue.Queue[str | None] = queue.Queue()
    role = _role(runner, handle)

    def read(host: int, stream: Stream | None) -> None:
        try:
            for line in runner.log_lines(handle, role, host, should_tail=True, streams=stream):
                lines.put(_prefixed(host, line.rstrip("\n")))
        except (SchedulerError, RuntimeError, OSError) as error:
            lines.put(f"papilio: the log of host {host} cannot be read: {error}")
        lines.put(None)

    chosen = hosts if only_host is None else [only_host]
    readers = [(host, stream) for host in chosen for stream in _log_streams(runner, handle)]
    for reader in readers:
        threading.Thread(target=read, args=reader, daemon=True).start()
    try:
        for _ in readers:
            while (line := lines.get()) is not None:
                printer.print(line)
        status = runner.wait(handle, wait_interval=POLL_S) or status
    except KeyboardInterrupt:
        printer.end_progress()
        print(f"papilio: {handle} goes on; papilio cancel {handle} ends it", file=sys.stderr)
        return 130
    printer.end_progress()
    print("\n".join(_status_lines(runner, handle, status)), file=sys.stderr)
    return _exit_status(handle, status)


def _exit_status(handle: str, status: AppStatus) -> int:
    """Return the status of the job's own command where it is known, or else 0 or 1."""
    if status.state == AppState.SUCCEEDED:
        return 0
    record = _record(handle)
    ended = last_event(read_events(record.folder), "ended", "begins") if record else None
    return int(ended.details[0]) or 1 if ended is not None and ended.what == "ended" else 1


def _prefixed(host: int, line: str) -> str:
    """Ranks say who they are; what the agent of another host than the first says needs its host."""
    return line if host == 0 or RANK_LINE.match(line) else f"host {host}: {line}"


def _schedulers_here() -> list[str]:
    return ["local_cwd", *(["slurm"] if shutil.which("squeue") else [])]


def _row_cells(job: Any, record: JobRecord | None) -> list[str]:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.submitted_s)) if record else "-"
    hosts = str(record.num_hosts) if record else "-"
    folder = os.path.relpath(record.folder) if record else "-"
    return [job.app_handle, job.name or "-", job.state.name, hosts, when, folder]


def _row_json(job: Any, record: JobRecord | None) -> dict[str, Any]:
    tree = {"job": job.app_handle, "name": job.name, "state": job.state.name}
    return tree | ({"submitted_s": record.submitted_s, "folder": record.folder} if record else {})


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
