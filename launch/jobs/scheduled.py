"""`papilio launch`, `logs`, `cancel`, `list`: jobs on Slurm, Kubernetes or this machine, through TorchX."""

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
from collections.abc import Sequence
from typing import Any

from torchx import specs
from torchx.runner import Runner
from torchx.schedulers.api import Stream
from torchx.specs import AppStatus

from papilio.data_pipeline.terminal import can_draw_over, num_columns
from papilio.launch.compat.torchx_internals import scheduler_of
from papilio.launch.component_arguments import build_app, our_components
from papilio.launch.jobs.first_error import slurm_error
from papilio.launch.jobs.job_status import (
    exit_status,
    find_job,
    handle_of,
    is_from_here,
    log_paths,
    record_of,
    status_lines,
    status_of,
)
from papilio.launch.jobs.live_text import table
from papilio.launch.local_run import LinePrinter
from papilio.launch.roles import NO_IMAGE
from papilio.launch.schedulers.errors import SchedulerError
from papilio.launch.schedulers.job_folder import JobRecord, ListedJob, read_index
from papilio.launch.schedulers.runner import make_runner
from papilio.launch.usage import UsageError

RANK_LINE = re.compile(r"^\[\d+\]:")
POLL_S = 1.0
MAX_LISTED = 20
# Of the list of jobs: job, name, state. Further columns are left out where the terminal is too narrow for them.
FEWEST_LISTED_COLUMNS = 3


def run_launch(namespace: argparse.Namespace) -> int:
    """Submit a component as a job, or print what would be submitted; with --follow, show its output to its end."""
    app = build_app(namespace.component, namespace.arguments)
    _check_image(namespace.component, app, namespace.scheduler)
    with make_runner() as runner:
        settings = _settings(runner, namespace.scheduler, namespace.cfg)
        info = runner.dryrun(app, namespace.scheduler, cfg=settings)
        if namespace.dryrun:
            print(info)
            return 0
        handle = runner.schedule(info)
        print(handle, flush=True)
        record = record_of(handle)
        if record is not None:
            print(f"logs and scripts: {os.path.relpath(record.folder)}", file=sys.stderr)
        if namespace.follow:
            return _follow(runner, handle)
        print(f"papilio status {handle}; papilio logs -f {handle}; papilio cancel {handle}", file=sys.stderr)
    return 0


def run_logs(namespace: argparse.Namespace) -> int:
    """Print what the hosts of a job printed; with --follow, go on until its end and leave with its status."""
    with make_runner() as runner:
        handle = handle_of(namespace.job)
        status = status_of(runner, handle)
        if namespace.follow:
            return _follow(runner, handle, namespace.host)
        scheduler = specs.parse_app_handle(handle)[0]
        paths = log_paths(runner, handle)
        if not paths and scheduler != "kubernetes":
            record = record_of(handle)
            reason = slurm_error(record.folder if record else None) or f"papilio status {handle} says why"
            raise SchedulerError(f"no host of {handle} has printed anything yet; {reason}")
        hosts = sorted(paths) or [replica.id for role in status.roles for replica in role.replicas]
        for host in hosts if namespace.host is None else [namespace.host]:
            for stream in _log_streams(runner, handle):
                for line in runner.log_lines(handle, _role(runner, handle), host, streams=stream):
                    print(_prefixed(host, line.rstrip("\n")))
    return 0


def run_cancel(namespace: argparse.Namespace) -> int:
    """Tell a job to end; its ranks save before. What may be another job than was meant is asked about first."""
    handle, is_exact = find_job(namespace.job)
    with make_runner() as runner:
        status = status_of(runner, handle)
        if status.is_terminal():
            print(f"{handle} has ended already: {status.state.name}")
            return 0
        if not is_exact and not _is_wanted(handle, status, namespace):
            print(f"{handle} goes on")
            return 0
        runner.cancel(handle)
        print(f"{handle} was told to end; its ranks save first (papilio status {handle})")
    return 0


def _is_wanted(handle: str, status: AppStatus, namespace: argparse.Namespace) -> bool:
    """Ask on a terminal whether this is the job to cancel, unless --yes says so.

    Raises:
        UsageError: there is nobody to ask, or the newest job was started from another folder.
    """
    record = record_of(handle)
    if record is None:
        known = "which was not launched from here: another machine, user or program started it"
    else:
        moment = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.submitted_s))
        known = f"{record.name}, started {moment} from {record.submitted_from}"
        if not is_from_here(record):
            raise UsageError(
                f"no job {'was' if namespace.job is None else f'called {namespace.job} was'} started from this folder; "
                f"papilio cancel {handle} ends the newest of all ({known})"
            )
    if namespace.yes:
        return True
    if not sys.stdin.isatty():
        word = "" if namespace.job is None else f" {namespace.job}"
        raise UsageError(
            f"papilio cancel{word} may end another job than you want, and there is no terminal to ask on: it is "
            f"{handle} ({known}); add --yes" + (f", or say papilio cancel {handle}" if record is not None else "")
        )
    print(f"cancel {handle} ({known}; {status.state.name})? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def run_list(namespace: argparse.Namespace) -> int:
    """Print this user's jobs, the newest last."""
    names = [namespace.scheduler] if namespace.scheduler else _schedulers_here()
    all_records, damaged = read_index()
    records = {(record.scheduler, record.app_id): record for record in all_records}
    rows = []
    with make_runner() as runner:
        for name in names:
            submitted_s = 0.0
            for job in runner.list(name):
                record = job.record if isinstance(job, ListedJob) else records.get((name, job.app_id))
                # A job that another launched has no record; schedulers list theirs in order.
                submitted_s = record.submitted_s if record else submitted_s
                rows.append((submitted_s, job, record))
            notice = getattr(scheduler_of(runner, name), "notice", None)
            if notice:
                print(f"papilio: {notice}; states are those that the jobs' folders know", file=sys.stderr)
    for path in damaged:
        print(f"papilio: {path} is no record of a job, and left out; remove it", file=sys.stderr)
    rows.sort(key=lambda row: row[0])
    if namespace.json:
        print(json.dumps([_row_json(job, record) for _, job, record in rows], indent=1))
        return 0
    shown = rows if namespace.all else rows[-MAX_LISTED:]
    cells = [["job", "name", "state", "hosts", "started", "folder"], *(_row_cells(job, rec) for _, job, rec in shown)]
    print("\n".join(_fitting(cells)) if shown else f"no jobs (on {', '.join(names)})")
    if len(shown) < len(rows):
        print(f"{len(rows) - len(shown)} older ones: --all")
    return 0


def _fitting(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return a table that the terminal shows without breaking its lines: without its last columns, if need be."""
    width, lines = num_columns(), table(cells)
    num_kept = len(cells[0])
    while width is not None and max(map(len, lines)) > width and num_kept > FEWEST_LISTED_COLUMNS:
        num_kept -= 1
        lines = table([row[:num_kept] for row in cells])
    return lines


def _settings(runner: Runner, scheduler: str, words: list[str]) -> dict[str, Any]:
    """Read the settings of a scheduler.

    Raises:
        UsageError: it has none of this name, or a word is no setting.
    """
    known = set(dict(runner.scheduler_run_opts(scheduler)))
    seen: set[str] = set()
    for word in words:
        parts = [part.partition("=") for part in re.split(r",(?=[^,=]*=)", word)]
        if "=" not in word or not {key for key, _, _ in parts} <= known:
            raise UsageError(f"-cfg {word}: the settings of {scheduler} are {', '.join(sorted(known))}, as key=value")
        for key, _, value in parts:
            if not value.strip():
                raise UsageError(f"-cfg {key}=: it is empty; give a value, or leave it out")
            if key in seen:
                raise UsageError(f"-cfg {key} is given twice, with {value} last; leave one of them out")
            seen.add(key)
    try:
        return dict(runner.cfg_from_str(scheduler, *words))
    except ValueError as error:
        raise UsageError(
            f"-cfg {','.join(words)[:200]}: {error}; write key=value, and a value with = or , in it in quotes, as in "
            "comment='\"a=b\"'"
        ) from None


def _check_image(name: str, app: specs.AppDef, scheduler: str) -> None:
    """Check that an image which was asked for is used; jobs of TorchX's own components always name one.

    Raises:
        UsageError: it would not be.
    """
    image = app.roles[0].image
    if scheduler != "kubernetes" and name.removeprefix("papilio.") in our_components() and image != NO_IMAGE:
        raise UsageError(
            f"--image {image}: {scheduler} starts no containers; leave --image out, or use -s kubernetes; --python "
            "names the interpreter that runs the job"
        )


def _role(runner: Runner, handle: str) -> str:
    app = runner.describe(handle)
    return str(app.roles[0].name) if app is not None and app.roles else "train"


def _log_streams(runner: Runner, handle: str) -> tuple[Stream | None, ...]:
    """What to ask for to get all that the hosts print: None, but where a scheduler keeps the streams apart."""
    scheduler, _, app_id = specs.parse_app_handle(handle)
    ask = getattr(scheduler_of(runner, scheduler), "log_streams", None)
    streams: tuple[Stream | None, ...] = ask(app_id) if ask is not None else (None,)
    return streams


def _follow(runner: Runner, handle: str, only_host: int | None = None) -> int:
    """Print the output of all hosts, or of one, as it comes; return the job's exit status at its end."""
    printer = LinePrinter(sys.stdout, num_columns() if can_draw_over() else None)
    status = status_of(runner, handle)
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
    print("\n".join(status_lines(runner, handle, status)), file=sys.stderr)
    return exit_status(handle, status)


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
