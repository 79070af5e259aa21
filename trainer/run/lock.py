"""One job at a time in a run folder and in a folder of checkpoints: a file in each says whose it is.

The file is created atomically (on a local disk and NFS by O_EXCL, on S3 by If-None-Match), and its holder writes it
anew every BEAT_S. Nothing depends on flock or on clocks that agree. A lock that is in the way is

- taken over at once, when its holder is this job (after a restart, a requeue, the loss of a host), or a process of this
  machine that has ended;
- waited for, when its holder is a process of this machine whose agent or command was killed: it ends by itself;
- watched, when its holder runs elsewhere, and taken over when it was not written for STALE_S;
- refused, when its holder is alive.

Whoever lost its lock that way, for example on a host that was cut off, saves nothing more. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from papilio.data_pipeline.errors import PapilioError
from papilio.data_pipeline.paths import join
from papilio.trainer.storage.api import (
    StorageError,
    create_file,
    exists,
    is_remote,
    make_folder,
    read_if_there,
    remove_empty_folder,
    remove_if_same,
    what_is_no_file,
    write_ephemeral,
)
from papilio.trainer.storage.retries import RetryPolicy

LOCK = "job.lock"
BEAT_S = 10.0
# Of a holder elsewhere: several beats, and as long as an NFS client may show an old file.
STALE_S = 60.0
# What ranks get that save while their agent or command is gone.
ENDING_WAIT_S = 30.0
POLL_S = 0.25
# After a lock was taken over where that is not atomic: another job may have taken it over just then.
SETTLE_S = 1.0
ONCE = RetryPolicy(num_attempts=1)
# The agent, and the command that started it.
NUM_PARENTS = 2
# Longer words, and greater numbers of processes (pid_max of Linux), are damage.
MAX_WORD, MAX_PID = 1_000, 1 << 22

Tell = Callable[[str], None]


class LockedError(PapilioError, ValueError):
    """Another job runs in this folder."""


class LostLockError(PapilioError):
    """Another job took this one's folder over."""


@dataclass(frozen=True)
class Waits:
    """How long to wait for the holder of a lock, in seconds."""

    stale_s: float = STALE_S
    ending_s: float = ENDING_WAIT_S
    poll_s: float = POLL_S
    settle_s: float = SETTLE_S
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.monotonic


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        token: of this taking of it.
        job: the name under which its restarts are known; None for a process that no agent started.
        space: in which `pid` counts: boot and pid namespace.
        start: when the process began, in the kernel's ticks since boot: pids are used again.
        parents: (pid, start) of its agent, and of the command that started that.
        since: UTC, ISO 8601.
        beat: how often it has written the file.
    """

    token: str
    job: str | None
    host: str
    pid: int
    space: str
    start: int | None
    parents: tuple[tuple[int, int], ...]
    since: str
    beat: int = 0

    @classmethod
    def here(cls, job: str | None) -> Holder:
        """Return this process as a holder."""
        since, pid = datetime.now(UTC).isoformat(timespec="seconds"), os.getpid()
        return cls(secrets.token_hex(8), job, socket.gethostname(), pid, _space(), _start_of(pid), _parents(), since)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Holder | None:
        """Read what `to_bytes` wrote; None for anything else."""
        try:
            tree = json.loads(raw.decode())
            found = cls(**{**tree, "parents": tuple((pid, start) for pid, start in tree["parents"])})
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return found if found._is_plausible() else None

    def _is_plausible(self) -> bool:
        """Whether all values are of a kind that `here` gives: they are printed, and processes looked for by them."""
        words = (self.token, self.host, self.space, self.since, *([] if self.job is None else [self.job]))
        pids = (self.pid, *(pid for pid, _ in self.parents))
        counts = (self.beat, *([] if self.start is None else [self.start]), *(start for _, start in self.parents))
        return (
            all(isinstance(word, str) and len(word) <= MAX_WORD and word.isprintable() for word in words)
            and all(type(pid) is int and 0 < pid <= MAX_PID for pid in pids)
            and all(type(count) is int and count >= 0 for count in counts)
        )

    def is_of(self, other: Holder) -> bool:
        """Whether this is another's earlier self: the same job, or the same process."""
        is_same_process = (self.host, self.space, self.pid, self.start) == (
            other.host,
            other.space,
            other.pid,
            other.start,
        )
        return is_same_process or (self.job is not None and self.job == other.job)

    def to_bytes(self) -> bytes:
        """Return it as JSON."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    def __str__(self) -> str:
        job = f"job {self.job}" if self.job is not None else "a job"
        return f"{job} (host {self.host}, pid {self.pid}, since {self.since})"


def job_name(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return what all restarts of this rank's job have in common, and no other job; None without an agent.

    A scheduler's number is enough: a requeued job may meet elsewhere. Names that people give are not, and count
    together with the place where the hosts meet.
    """
    run_id = environment.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    slurm_id = environment.get("SLURM_JOB_ID")
    if slurm_id and re.fullmatch(rf"{re.escape(slurm_id)}(\.\d+)?", run_id):
        cluster = environment.get("SLURM_CLUSTER_NAME", "")
        return f"{slurm_id} of Slurm{f' cluster {cluster}' if cluster else ''}"
    return named_at(run_id, environment.get("PET_RDZV_ENDPOINT", ""))


def named_at(run_id: str, endpoint: str) -> str:
    """Return the name of a job whose hosts meet at an endpoint."""
    return f"{run_id} at {endpoint}" if endpoint and not endpoint.startswith("localhost:") else run_id


def require_unlocked(folders: Sequence[str], job: str | None, tell: Tell, waits: Waits | None = None) -> None:
    """Check, before anything is started, that no other job holds one of these folders; wait for one that is ending.

    A lock that no longer counts is removed; this job's own stays.

    Raises:
        LockedError: one does.
        StorageError: a lock cannot be read or removed.
    """
    for folder in dict.fromkeys(folders):
        file = _LockFile(folder, Holder.here(job), tell, waits or Waits())
        while (raw := file.read()) is not None and not file.is_mine(raw):
            if file.is_free(raw):
                remove_if_same(file.path, raw)


def holder_of(folder: str) -> Holder | str | None:
    """Return who holds a folder, as far as this host can see; None for nobody, or for one who has ended.

    Where a lock does not tell, what is wrong with it, as words.
    """
    path = join(folder, LOCK)
    kind = what_is_no_file(path)
    if kind is not None:
        return f"{path} is {kind}, where a file belongs"
    raw = read_if_there(path)
    if raw is None:
        return None
    holder = Holder.from_bytes(raw)
    if holder is None:
        return f"{path} is damaged: it does not say which job holds it"
    return None if _state_of(holder) == "gone" else holder


class RunLock:
    """Holds the locks of some folders until `release`; a thread keeps them fresh."""

    def __init__(self, folders: Sequence[str], job: str | None, tell: Tell, waits: Waits | None = None) -> None:
        """Take them.

        Raises:
            LockedError: another job holds one; none is taken then.
            StorageError: a folder cannot be written.
        """
        self.holder = Holder.here(job)
        self._end = threading.Event()
        self._files: list[_LockFile] = []
        try:
            for folder in dict.fromkeys(folders):
                file = _LockFile(folder, self.holder, tell, waits or Waits())
                file.take()
                self._files.append(file)
        except BaseException:
            self._release_files()
            raise
        self._thread = threading.Thread(target=self._keep_fresh, name="run_lock", daemon=True)
        self._thread.start()

    def require_held(self) -> None:
        """Check that the folders are still this job's; a storage that does not say so is no proof of the contrary.

        Raises:
            LostLockError: another one has taken a folder over.
        """
        for file in self._files:
            other = file.other_holder()
            if other is not None:
                raise LostLockError(
                    f"{file.folder} was taken over by {other}, as this job had not renewed {LOCK} for {STALE_S:g} s: "
                    "this one saves nothing more. Was this host cut off, or suspended?"
                )

    def release(self) -> None:
        """Give the folders free."""
        self._end.set()
        self._thread.join()
        self._release_files()

    def _keep_fresh(self) -> None:
        while not self._end.wait(BEAT_S):
            for file in self._files:
                file.beat()

    def _release_files(self) -> None:
        for file in reversed(self._files):
            file.release()


class _LockFile:
    """The lock of one folder."""

    def __init__(self, folder: str, holder: Holder, tell: Tell, waits: Waits) -> None:
        self.folder = folder
        self.path = join(folder, LOCK)
        self._holder = holder
        self._tell = tell
        self._waits = waits
        self._is_new_folder = False
        self._num_beats = 0
        self._damaged: bytes | None = None

    def take(self) -> None:
        self._is_new_folder = not exists(self.folder)
        make_folder(self.folder)
        is_taking_over = False
        while True:
            if create_file(self.path, self._holder.to_bytes()):
                if not is_taking_over or not is_remote(self.path):
                    return
                self._waits.sleep(self._waits.settle_s)
                if self.other_holder() is None:
                    return
            raw = self.read()
            if raw is not None and (self.is_mine(raw) or self.is_free(raw)):
                is_taking_over |= remove_if_same(self.path, raw)

    def read(self) -> bytes | None:
        """Return what the lock says; None if there is none.

        Raises:
            LockedError: what lies there is no file, and none of ours.
            StorageError: it cannot be read.
        """
        kind = what_is_no_file(self.path)
        if kind is not None:
            raise LockedError(
                f"{self.path} is {kind}, where the file belongs that says which job has this folder: remove it, or "
                "choose another folder (output.run_dir, checkpoint.folder)"
            )
        return read_if_there(self.path)

    def is_mine(self, raw: bytes) -> bool:
        """Whether a lock that reads so is this job's own, of before a restart."""
        holder = Holder.from_bytes(raw)
        return holder is not None and holder.is_of(self._holder)

    def is_free(self, raw: bytes) -> bool:
        """Whether a lock of another job, that reads so, counts no more; waits to see that. False: look again.

        Raises:
            LockedError: its holder is alive.
        """
        holder = Holder.from_bytes(raw)
        state = _state_of(holder)
        if state == "held":
            raise LockedError(self._refusal(holder))
        if state == "ending":
            self._tell(f"{self.folder} is still in use by {holder}, whose command was killed; waiting for its end")
            if self._is_unchanged(raw, self._waits.ending_s, until_gone=holder):
                raise LockedError(self._refusal(holder))
            return False
        if state == "elsewhere":
            seconds = f"{self._waits.stale_s:g} s"
            self._tell(f"{self.folder} is locked by {_shown(holder)}; watching it for up to {seconds}")
            if not self._is_unchanged(raw, self._waits.stale_s):
                self._refuse_if_alive(holder)
                return False
        why = (
            "whose process has ended" if state == "gone" else f"which has not renewed it for {self._waits.stale_s:g} s"
        )
        self._tell(f"{self.folder} was locked by {_shown(holder)}, {why}: its lock does not count")
        return True

    def other_holder(self) -> str | None:
        """Say who else holds it now; None where nobody does, or the storage does not say."""
        try:
            raw = read_if_there(self.path, retries=ONCE)
        except StorageError:
            return None
        holder = Holder.from_bytes(raw) if raw else self._holder
        return None if holder is None or holder.token == self._holder.token else str(holder)

    def beat(self) -> None:
        """Write it anew, unless it is another's by now. A storage that fails for a while may answer the next time."""
        with suppress(StorageError):
            raw = read_if_there(self.path, retries=ONCE)
            if raw is None:  # removed by hand
                create_file(self.path, self._holder.to_bytes(), retries=ONCE)
                return
            holder = Holder.from_bytes(raw)
            # Damaged at two heartbeats, it is not another's that is just being written: others are not to wait it out.
            if (holder is None and raw == self._damaged) or (holder is not None and holder.token == self._holder.token):
                self._num_beats += 1
                text = replace(self._holder, beat=self._num_beats).to_bytes().decode()
                write_ephemeral(self.path, text, retries=ONCE)
            self._damaged = raw if holder is None else None

    def release(self) -> None:
        with suppress(StorageError):
            raw = read_if_there(self.path)
            holder = Holder.from_bytes(raw) if raw else None
            if raw and holder is not None and holder.token == self._holder.token:
                remove_if_same(self.path, raw)
            if self._is_new_folder:
                remove_empty_folder(self.folder)

    def _is_unchanged(self, raw: bytes, timeout_s: float, until_gone: Holder | None = None) -> bool:
        """Whether the file reads the same, and the process is there, all this time."""
        deadline_s = self._waits.now() + timeout_s
        while read_if_there(self.path) == raw and (until_gone is None or _state_of(until_gone) != "gone"):
            if self._waits.now() > deadline_s:
                return True
            self._waits.sleep(self._waits.poll_s)
        return False

    def _refuse_if_alive(self, before: Holder | None) -> None:
        raw = read_if_there(self.path)
        now = Holder.from_bytes(raw) if raw else None
        if before is not None and now is not None and now.token == before.token:
            raise LockedError(self._refusal(now))

    def _refusal(self, holder: Holder | None) -> str:
        assert holder is not None
        pid = holder.parents[0][0] if holder.parents else holder.pid
        return (
            f"{self.folder} is in use by {holder}: one job at a time trains there. Wait for its end, end it (on "
            f"{holder.host}: kill {pid}), or choose another folder (output.run_dir, checkpoint.folder)"
        )


def _shown(holder: Holder | None) -> str:
    return str(holder) if holder is not None else "a job whose name cannot be read"


def _state_of(holder: Holder | None) -> str:
    """Say how a holder is, as far as this host knows: gone, ending, held, elsewhere."""
    if holder is None or not holder.space or (holder.host, holder.space) != (socket.gethostname(), _space()):
        return "elsewhere"
    if _is_hidden(holder.pid):
        return "elsewhere"
    if _start_of(holder.pid) != holder.start:
        return "gone"
    has_lost_parent = any(_start_of(pid) != start for pid, start in holder.parents)
    return "ending" if has_lost_parent else "held"


def _space() -> str:
    """Name what makes pids unique here: this boot of the kernel, and the pid namespace; empty if it is not known."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _stat_of(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on; none for a process that is not there, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields


def _is_hidden(pid: int) -> bool:
    """Whether a process is there of which /proc does not tell: another user's, where it is mounted with hidepid."""
    if os.path.exists(f"/proc/{pid}"):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it is there, and another user's
    return True


def _start_of(pid: int) -> int | None:
    fields = _stat_of(pid)
    return int(fields[19]) if fields else None


def _parents() -> tuple[tuple[int, int], ...]:
    """Return this process's agent and the command that started that; init, which never goes, is neither."""
    found: list[tuple[int, int]] = []
    pid = os.getppid()
    while len(found) < NUM_PARENTS and pid > 1 and (fields := _stat_of(pid)):
        found.append((pid, int(fields[19])))
        pid = int(fields[1])
    return tuple(found)
