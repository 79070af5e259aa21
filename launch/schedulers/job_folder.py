"""A job's folder: what was started, by which command, what each host prints, and how it ended.

    job.json       who started what, where and when
    host.sh        what each host runs; job.sh, what Slurm runs
    host_3.log     what the agent and the ranks of host 3 print, in all attempts
    job.events     attempts: their hosts, statuses, and why there was another; host_3.events, those of one host

The scheduler forgets a job in minutes where it has no database; the folder does not. A line of an events file is a time
(seconds since 1970), the attempt, a word and more words, with tabs between them.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.schedulers.errors import SchedulerError
from trainer.exit_codes import NO_RESTART_EXIT_CODE, RESUME_EXIT_CODE

JOB, EVENTS = "job.json", "job.events"
HOST_LOG = re.compile(r"host_(\d+)\.log")


@dataclass(frozen=True)
class JobRecord:
    """What is known of a job from when it was started."""

    scheduler: str
    app_id: str
    name: str
    role: str
    num_hosts: int
    command: tuple[str, ...]
    folder: str
    submitted_s: float
    submitted_on: str
    submitted_from: str
    max_retries: int = 0

    @property
    def handle(self) -> str:
        """The job's name for TorchX and for `papilio status`."""
        return f"{self.scheduler}://papilio/{self.app_id}"


@dataclass(frozen=True)
class Event:
    """One line of an events file."""

    time_s: float
    attempt: int
    what: str
    details: tuple[str, ...]


def new_folder(jobs_dir: str, name: str) -> Path:
    """Return the name of a folder for one job, which is not made yet.

    Raises:
        SchedulerError: jobs cannot be noted where they are found again; told before one is started.
    """
    index = _index()
    nearest = next(folder for folder in (index, *index.parents) if folder.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise SchedulerError(
            f"jobs are noted in {index}, and {nearest} cannot be written; set XDG_STATE_HOME to a folder that can be"
        )
    moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return Path(jobs_dir).absolute() / f"{name.replace('/', '-')}-{moment}-{secrets.token_hex(3)}"


def write_record(record: JobRecord) -> None:
    """Write job.json, and note the folder where `papilio list` finds it from anywhere."""
    text = json.dumps(asdict(record), indent=1) + "\n"
    folder = Path(record.folder)
    (folder / JOB).write_text(text, encoding="utf-8")
    index = _index()
    index.mkdir(parents=True, exist_ok=True)
    (index / f"{folder.name}.json").write_text(text, encoding="utf-8")


def read_records() -> list[JobRecord]:
    """Return the jobs that this user started on this machine and whose folders are still there, oldest first."""
    records = [record for record in map(_read_record, _index().glob("*.json")) if record is not None]
    return sorted(records, key=lambda record: record.submitted_s)


def find_record(scheduler: str, app_id: str) -> JobRecord | None:
    """Return the newest job of this id: clusters count from 1, so that ids come again."""
    found = [record for record in read_records() if (record.scheduler, record.app_id) == (scheduler, app_id)]
    return found[-1] if found else None


def read_folder(folder: str) -> JobRecord | None:
    """Return the record in a job's folder, None if it is not one."""
    return _read_record(Path(folder) / JOB)


def read_events(folder: str, file: str = EVENTS) -> list[Event]:
    """Return what has happened so far; a line that is being written now is left out."""
    path = Path(folder) / file
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return list(_parsed(lines))


def host_logs(folder: str) -> dict[int, Path]:
    """Return the logs that there are, by host."""
    found = {HOST_LOG.fullmatch(path.name): path for path in Path(folder).glob("host_*.log")}
    return dict(sorted((int(match[1]), path) for match, path in found.items() if match is not None))


def last_event(events: list[Event], *whats: str) -> Event | None:
    """Return the newest event of these kinds."""
    return next((event for event in reversed(events) if event.what in whats), None)


def meaning_of(status: str) -> str:
    """Say what the status that a job ended with means."""
    meanings = {
        str(RESUME_EXIT_CODE): "the ranks saved before",
        str(NO_RESTART_EXIT_CODE): f"status {NO_RESTART_EXIT_CODE}: it would go wrong again, and is not tried again",
    }
    return meanings.get(status, f"status {status}")


def _parsed(lines: list[str]) -> Iterator[Event]:
    for line in lines:
        time_s, attempt, what, *details = line.split("\t")
        yield Event(float(time_s), int(attempt), what, tuple(details))


def _index() -> Path:
    """Where desktop programs keep such state, too."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "papilio" / "jobs"


def _read_record(path: Path) -> JobRecord | None:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    tree["command"] = tuple(tree["command"])
    record = JobRecord(**tree)
    return record if Path(record.folder, JOB).exists() else None
