"""One job at a time in a folder: who is refused, who is waited for, whose lock is taken over."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from papilio.launch import cli
from papilio.launch.jobs import local as local_jobs
from papilio.trainer.run import lock as run_lock
from papilio.trainer.run.lock import (
    LOCK,
    Holder,
    LockedError,
    LostLockError,
    RunLock,
    Waits,
    holder_of,
    require_unlocked,
)
from papilio.trainer.storage import api as storage


class Clock:
    """Time that passes by sleeping alone; `meanwhile` happens during the first sleep."""

    def __init__(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.seconds = 0.0
        self._meanwhile: list[Callable[[], None]] = [meanwhile]

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        if self._meanwhile:
            self._meanwhile.pop()()

    def waits(self) -> Waits:
        return Waits(sleep=self.sleep, now=lambda: self.seconds)


@contextmanager
def another_process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def holder(pid: int, job: str | None = "other", **changes: object) -> Holder:
    """What a process of this machine would write; `pid` as the kernel shows it, independent of the code."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    here = Holder.here(job)
    changed = {"pid": pid, "start": int(fields[19]), "parents": (), "since": "2026-01-02T03:04:05+00:00", **changes}
    return replace(here, **changed)  # type: ignore[arg-type]


def write(folder: Path, lock: Holder) -> None:
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_bytes(lock.to_bytes())


def take(folder: Path, clock: Clock | None = None, job: str | None = "mine") -> tuple[RunLock, list[str]]:
    said: list[str] = []
    return RunLock([str(folder)], job, said.append, (clock or Clock()).waits()), said


def test_a_second_job_is_refused_at_once_with_who_is_there_and_what_to_do(tmp_path: Path) -> None:
    with another_process() as process:
        write(tmp_path, holder(process.pid))
        before, clock = (tmp_path / LOCK).read_bytes(), Clock()
        with pytest.raises(LockedError) as refused:
            take(tmp_path, clock)
        assert (tmp_path / LOCK).read_bytes() == before
    host = socket.gethostname()
    assert str(refused.value) == (
        f"{tmp_path} is in use by job other (host {host}, pid {process.pid}, since 2026-01-02T03:04:05+00:00): one job "
        f"at a time trains there. Wait for its end, end it (on {host}: kill {process.pid}), or choose another folder "
        "(output.run_dir, checkpoint.folder)"
    )
    assert clock.seconds == 0


def test_a_lock_of_a_process_that_was_killed_is_taken_over_at_once_and_said(tmp_path: Path) -> None:
    with another_process() as process:
        write(tmp_path, holder(process.pid))
    clock = Clock()
    lock, said = take(tmp_path, clock)
    assert clock.seconds == 0
    assert f"was locked by job other (host {socket.gethostname()}, pid {process.pid}" in said[0]
    assert "whose process has ended" in said[0]
    lock.release()
    assert not (tmp_path / LOCK).exists()


def test_a_pid_that_another_process_has_by_now_holds_nothing(tmp_path: Path) -> None:
    with another_process() as process:
        write(tmp_path, replace(holder(process.pid), start=1))
        lock, _ = take(tmp_path)
    lock.release()


def test_a_restart_of_the_same_job_gets_its_own_lock_wherever_it_was_held(tmp_path: Path) -> None:
    write(tmp_path, holder(os.getppid(), "mine", host="lost", space="another boot"))
    clock = Clock()
    lock, said = take(tmp_path, clock)
    assert (clock.seconds, said) == (0, [])
    lock.release()


def test_a_holder_elsewhere_that_lives_is_seen_by_its_heartbeat(tmp_path: Path) -> None:
    there = holder(os.getppid(), host="n7", space="another boot")
    write(tmp_path, there)
    with pytest.raises(LockedError, match=r"in use by job other \(host n7"):
        take(tmp_path, Clock(lambda: write(tmp_path, replace(there, beat=1))))


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"pid": 1}'])
def test_a_lock_that_nobody_renews_counts_no_more_after_a_minute(tmp_path: Path, content: bytes | None) -> None:
    """Of a host that is gone, or cut off in writing it."""
    write(tmp_path, holder(os.getppid(), host="n7", space="another boot"))
    if content is not None:
        (tmp_path / LOCK).write_bytes(content)
    clock = Clock()
    lock, said = take(tmp_path, clock)
    assert 60 <= clock.seconds < 62
    assert "which has not renewed it for 60 s" in said[-1]
    assert json.loads((tmp_path / LOCK).read_text())["job"] == "mine"
    lock.release()


def test_a_lock_with_values_that_no_job_writes_is_a_damaged_one(tmp_path: Path) -> None:
    here = json.loads(holder(os.getpid()).to_bytes())
    changes = [
        {"pid": "../1"}, {"pid": "\0"}, {"pid": [1]}, {"pid": 0}, {"pid": 10**30}, {"parents": [[1e999, 1]]},
        {"parents": [[1, "2"]]}, {"host": "a\x1b[2J"}, {"host": "\ud800"}, {"host": "h" * 5_000}, {"job": ["mine"]},
        {"beat": None}, {"start": "5"}, {"since": 7},
    ]  # fmt: skip
    damaged = [b"[" * 100_000, b'{"a":' * 100_000, json.dumps(here).encode("utf-16")]
    assert Holder.from_bytes(json.dumps(here).encode()) is not None
    for raw in [*damaged, *(json.dumps(here | change).encode() for change in changes)]:
        assert Holder.from_bytes(raw) is None, raw[:99]
    (tmp_path / LOCK).write_bytes(damaged[0])
    clock = Clock()
    lock, said = take(tmp_path, clock)
    assert 60 <= clock.seconds < 62
    assert "a job whose name cannot be read" in said[0]
    lock.release()


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkdir, "a folder"),
        (os.mkfifo, "a pipe"),
        (lambda path: os.symlink("nowhere", path), "a link"),
        (lambda path: os.symlink(LOCK, path), "a link"),
    ],
)
def test_what_is_no_file_in_the_place_of_a_lock_is_refused(
    tmp_path: Path,
    make: Callable[[str], None],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A pipe would be read for ever, and of a link to nowhere each try would find that another was faster."""
    monkeypatch.setattr(local_jobs, "check_start", lambda config: None)
    make(str(tmp_path / LOCK))
    with pytest.raises(LockedError, match=rf"job.lock is {kind}.*remove it, or choose another folder \(output.run_dir"):
        take(tmp_path)
    assert cli.main(["train", "--recipe", "quickstart", f"--output.run_dir={tmp_path}"]) == 78
    assert capsys.readouterr().err.startswith(f"papilio train: error: {tmp_path / LOCK} is {kind}")


def test_a_lock_that_was_damaged_is_fixed_by_its_holder_at_the_second_heartbeat(tmp_path: Path) -> None:
    lock, _ = take(tmp_path)
    (tmp_path / LOCK).write_bytes(b"")
    lock._files[0].beat()
    assert (tmp_path / LOCK).read_bytes() == b"", "another job may be writing it just now"
    lock._files[0].beat()
    assert json.loads((tmp_path / LOCK).read_text())["token"] == lock.holder.token
    lock.release()
    assert not (tmp_path / LOCK).exists()


def test_a_process_that_proc_hides_has_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /proc mounted with hidepid hides other users' processes, while signals say that they are there."""

    def forbid(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    there = replace(holder(os.getpid()), start=1, pid=run_lock.MAX_PID)
    monkeypatch.setattr(os, "kill", forbid)
    write(tmp_path, there)
    with pytest.raises(LockedError, match="in use by job other"):
        take(tmp_path, Clock(lambda: write(tmp_path, replace(there, beat=1))))


def test_ranks_whose_command_was_killed_are_waited_for(tmp_path: Path) -> None:
    with another_process() as command, another_process() as rank:
        write(tmp_path, holder(rank.pid, parents=((command.pid, 1),)))
        clock = Clock(rank.kill)
        lock, said = take(tmp_path, clock)
        assert "whose command was killed; waiting for its end" in said[0]
    lock.release()
    with another_process() as rank:
        write(tmp_path, holder(rank.pid, parents=((command.pid, 1),)))
        clock = Clock()
        with pytest.raises(LockedError):
            take(tmp_path, clock)
        assert 30 <= clock.seconds < 32


def test_whoever_lost_the_folder_saves_nothing_more_and_leaves_the_lock(tmp_path: Path) -> None:
    lock, _ = take(tmp_path)
    lock.require_held()
    other = holder(os.getppid(), host="n7")
    write(tmp_path, other)
    for file in lock._files:
        file.beat()
    with pytest.raises(LostLockError, match=r"was taken over by job other \(host n7.*saves nothing more"):
        lock.require_held()
    lock.release()
    assert (tmp_path / LOCK).read_bytes() == other.to_bytes()


def test_a_heartbeat_writes_the_lock_anew_also_where_it_was_removed(tmp_path: Path) -> None:
    lock, _ = take(tmp_path)
    for beat in (1, 2):
        lock._files[0].beat()
        assert json.loads((tmp_path / LOCK).read_text())["beat"] == beat
    (tmp_path / LOCK).unlink()
    lock._files[0].beat()
    assert json.loads((tmp_path / LOCK).read_text())["token"] == lock.holder.token
    lock.release()


def test_both_folders_are_locked_or_none(tmp_path: Path) -> None:
    """Two runs with one folder of checkpoints would prune each other's."""
    with another_process() as process:
        write(tmp_path / "checkpoints", holder(process.pid))
        with pytest.raises(LockedError, match="checkpoints is in use"):
            RunLock([str(tmp_path / "run"), str(tmp_path / "checkpoints")], "mine", print)
    assert not (tmp_path / "run").exists(), "a folder that was made for the lock goes with it"


def test_of_jobs_that_start_together_one_gets_the_folder(tmp_path: Path) -> None:
    """Also where a dead one's lock is in the way of all."""
    code = (
        "import sys; from papilio.trainer.run.lock import RunLock, LockedError\n"
        "input()\n"
        "try: lock = RunLock([sys.argv[1]], sys.argv[2], lambda line: None); print('got it', flush=True); input()\n"
        "except LockedError: print('refused', flush=True)\n"
    )
    with another_process() as dead:
        write(tmp_path, holder(dead.pid))
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), f"job {number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for job in jobs:
        job.stdin.write("\n")
        job.stdin.flush()
    said = sorted(job.stdout.readline().strip() for job in jobs)
    for job in jobs:
        job.communicate("\n")
    assert said == ["got it", "refused", "refused", "refused"]


def test_in_an_object_store_one_alone_creates_the_lock(s3, pauses) -> None:
    path = s3.url("run/job.lock")
    assert storage.create_file(path, b"one", retries=pauses.policy)
    assert not storage.create_file(path, b"two", retries=pauses.policy)
    assert storage.read_if_there(path) == b"one"
    assert not storage.remove_if_same(path, b"two")
    assert storage.remove_if_same(path, b"one")
    assert storage.read_if_there(path) is None
    s3.faults.lose_answer(1, "PUT")
    assert storage.create_file(path, b"one", retries=pauses.policy), "its own, though the answer was lost"
    s3.faults.truncate(1)
    assert storage.create_file(s3.url("run/other"), b"one", retries=pauses.policy)
    assert storage.read_if_there(s3.url("run/other")) == b"one"


def test_a_lock_in_an_object_store_is_refused_and_taken_over(s3) -> None:
    folder = s3.url("run")
    with another_process() as process:
        storage.write_file(f"{folder}/{LOCK}", lambda: [holder(process.pid).to_bytes()])
        with pytest.raises(LockedError, match=f"{folder} is in use by job other"):
            RunLock([folder], "mine", print)
    clock = Clock()
    lock = RunLock([folder], "mine", print, clock.waits())
    assert clock.seconds == run_lock.SETTLE_S, "others may have taken it over at the same moment"
    lock._files[0].beat()
    lock.release()
    assert storage.list_folder(folder) == []


def test_a_command_looks_before_it_starts_ranks_and_leaves_its_own_jobs_lock(tmp_path: Path) -> None:
    with another_process() as process:
        write(tmp_path, holder(process.pid, "two at n1:29400"))
        with pytest.raises(LockedError):
            require_unlocked([str(tmp_path)], None, print)
        require_unlocked([str(tmp_path)], run_lock.named_at("two", "n1:29400"), print)
        assert holder_of(str(tmp_path)).pid == process.pid
    assert (tmp_path / LOCK).exists()
    assert holder_of(str(tmp_path)) is None
    require_unlocked([str(tmp_path)], None, print)
    assert not (tmp_path / LOCK).exists()


def test_the_restarts_of_a_job_have_one_name_and_other_jobs_another() -> None:
    slurm = {"TORCHELASTIC_RUN_ID": "16", "SLURM_JOB_ID": "16", "SLURM_CLUSTER_NAME": "blue"}
    assert run_lock.job_name({**slurm, "PET_RDZV_ENDPOINT": "n1:29500"}) == "16 of Slurm cluster blue"
    assert run_lock.job_name({**slurm, "PET_RDZV_ENDPOINT": "n9:29500"}) == "16 of Slurm cluster blue"
    by_hand = {"TORCHELASTIC_RUN_ID": "train", "PET_RDZV_ENDPOINT": "n1:29400", "SLURM_JOB_ID": "16"}
    assert run_lock.job_name(by_hand) == "train at n1:29400"
    assert run_lock.job_name({"TORCHELASTIC_RUN_ID": "train-x7", "PET_RDZV_ENDPOINT": "localhost:4711"}) == "train-x7"
    assert run_lock.job_name({}) is None


def test_train_in_a_folder_in_use_starts_nothing_and_ends_with_78(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(app: object) -> int:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(local_jobs, "run_locally", start)
    monkeypatch.setattr(local_jobs, "check_start", lambda config: None)  # of the data set, which need not be there
    for folder in (tmp_path, tmp_path / "checkpoints"):
        write(folder, holder(os.getppid(), "train-x7"))
        assert cli.main(["train", "--recipe", "quickstart", f"--output.run_dir={tmp_path}"]) == 78
        error = capsys.readouterr().err
        assert error.startswith(f"papilio train: error: {folder} is in use by job train-x7 (host ")
        (folder / LOCK).unlink()
