"""A job's folder: what was started, by which command, what each host prints, and how it ended.

    job.json       who started what, where and when
    host.sh        what each host runs; job.sh, what Slurm runs
    host_3.log     what the agent and the ranks of host 3 print, in all attempts
    job.events     attempts: their hosts, statuses, and why there was another; host_3.events, those of one host
    cancel.events  when this user cancelled it, a file of its own, as another machine writes into job.events
    job.log        what Slurm itself says about starting the hosts

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

from pydantic import TypeAdapter, ValidationError
from torchx.schedulers.api import ListAppResponse

from papilio.data_pipeline.local_path import PathError, check_local_path
from papilio.launch.schedulers.errors import RequestError, SchedulerError
from papilio.trainer.elastic.exit_codes import NO_RESTART_EXIT_CODE, RESUME_EXIT_CODE

JOB, EVENTS, CANCEL_EVENTS = "job.json", "job.events", "cancel.events"
EVENT = re.compile(r"(\d+(?:\.\d+)?)\t(\d+)\t(\w+)\t(.*)", re.ASCII)
HOST_LOG = re.compile(r"host_(\d+)\.log")
# A folder's name ends with a moment and a random number, and a file's name has at most 255 bytes.
MAX_STEM = 100
# A line of a script, a pattern of Slurm's (in which a backslash turns all others off) and a path at once.
NO_FOLDER_CHARACTERS = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")


@dataclass(frozen=True)
class JobRecord:
    """What is known of a job from when it was started.

    A number is a job's name on one cluster only: on Slurm `cluster` and `accepted_s`, when Slurm accepted it by its own
    clock, tell it from another job of that number; "" and 0 in records of older releases.
    """

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
    cluster: str = ""
    accepted_s: float = 0.0

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


@dataclass
class ListedJob(ListAppResponse):  # type: ignore[misc]
    """A job of `papilio list`, with what was noted when it was started."""

    record: JobRecord | None = None


_RECORD = TypeAdapter(JobRecord)


def new_folder(jobs_dir: str, name: str) -> Path:
    """Return the name of a folder for one job, which is not made yet.

    Raises:
        RequestError: scripts cannot name it, or it is on no disk.
    """
    try:
        check_local_path(jobs_dir, "-cfg jobs_dir")
    except PathError as error:
        raise RequestError(str(error)) from None
    parent = Path(jobs_dir).absolute()
    found = NO_FOLDER_CHARACTERS.search(str(parent))
    if found is not None or not jobs_dir:
        seen = f"has the character {found[0]!r}" if found is not None else "is not named"
        raise RequestError(f"the jobs folder {str(parent)!r} {seen}: choose another with -cfg jobs_dir=FOLDER")
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:MAX_STEM]
    moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return parent / f"{stem}-{moment}-{secrets.token_hex(3)}"


def make_folder(folder: Path) -> None:
    """Make a job's folder, and the index that will name it, before the job is anyone's.

    Raises:
        SchedulerError: one of them cannot be made or written.
    """
    # The job's own folder last, so that none is left of a job that cannot be noted.
    for place, how in ((_index(), "XDG_STATE_HOME=FOLDER in the environment"), (folder, "-cfg jobs_dir=FOLDER")):
        try:
            place.mkdir(parents=True, exist_ok=place != folder)
            (place / ".writable").touch()
            (place / ".writable").unlink()
        except OSError as error:
            raise SchedulerError(
                f"{place} cannot be made or written ({error.strerror}), and nothing was started; choose another place "
                f"with {how}"
            ) from None


def write_record(record: JobRecord) -> None:
    """Write job.json, and note the folder where `papilio list` finds it from anywhere.

    Raises:
        SchedulerError: they cannot be written; the job goes on, and the message says how it is called.
    """
    # Words of a command line need not be UTF-8, a file of JSON must.
    text = json.dumps(asdict(record), indent=1, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"
    folder = Path(record.folder)
    try:
        for path in (folder / JOB, _index() / f"{folder.name}.json"):
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SchedulerError(
            f"{record.handle} was started, but {error.filename} cannot be written ({error.strerror}): `papilio list` "
            f"will not know it; its logs are in {folder}"
        ) from None


def read_index() -> tuple[list[JobRecord], list[str]]:
    """Return the jobs that this user started on this machine, oldest first, and what of the index is no job.

    Jobs whose folders were removed are neither.
    """
    records, damaged = [], []
    for path in _index().glob("*.json"):
        try:
            record = _RECORD.validate_json(path.read_bytes())
        except FileNotFoundError:  # another process removes it now
            continue
        except (OSError, ValidationError):
            damaged.append(str(path))
            continue
        if _is_there(record):
            records.append(record)
    return sorted(records, key=lambda record: record.submitted_s), sorted(damaged)


def read_records() -> list[JobRecord]:
    """Return the jobs that this user started on this machine and whose folders are still there, oldest first."""
    return read_index()[0]


def find_records(scheduler: str, app_id: str) -> list[JobRecord]:
    """Return the jobs of this id, oldest first: each cluster counts from 1, so that ids come again."""
    return [record for record in read_records() if (record.scheduler, record.app_id) == (scheduler, app_id)]


def find_record(scheduler: str, app_id: str) -> JobRecord | None:
    """Return the newest job of this id."""
    return next(reversed(find_records(scheduler, app_id)), None)


def why_unreadable(folder: str) -> str | None:
    """Say why the files of a job's folder cannot be read, None if they can."""
    try:
        os.listdir(folder)
    except OSError as error:
        return f"its folder {folder} cannot be read: {error.strerror}"
    return None


def note_cancelled(record: JobRecord) -> None:
    """Remember that this user cancelled the job, for when the scheduler no longer does."""
    with Path(record.folder, CANCEL_EVENTS).open("a", encoding="utf-8") as events:
        events.write(f"{time.time():.3f}\t1\tcancelled\t{os.getuid()}\n")


def read_events(folder: str, file: str = EVENTS) -> list[Event]:
    """Return what has happened so far; a line that is being written now is left out."""
    try:
        text = (Path(folder) / file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return list(_parsed(text.split("\n")[:-1]))


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
    """What a full disk or a crash left of a line is no event."""
    for line in lines:
        match = EVENT.fullmatch(line)
        if match is not None:
            yield Event(float(match[1]), int(match[2]), match[3], tuple(match[4].split("\t")))


def _index() -> Path:
    """Where desktop programs keep such state, too."""
    try:
        state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    except RuntimeError:  # a user id without an entry in the system's list of users
        raise SchedulerError(
            "this user has no home, where jobs are noted: set HOME or XDG_STATE_HOME to a folder"
        ) from None
    return Path(state) / "papilio" / "jobs"


def _is_there(record: JobRecord) -> bool:
    try:
        return Path(record.folder, JOB).exists()
    except OSError:  # behind a folder that may not be read now
        return True
