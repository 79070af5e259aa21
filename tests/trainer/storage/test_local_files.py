"""Local disks: errors that pass and that last, full disks, what is flushed when."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from papilio.trainer.run.appended_file import AppendedFile
from papilio.trainer.storage import api as storage
from papilio.trainer.storage.api import StorageError
from papilio.trainer.storage.retries import RetryPolicy
from tests.support.storages import REPOSITORY, Pauses, run_python


def test_pauses_double_up_to_a_limit_and_are_shortened_at_random() -> None:
    policy = RetryPolicy(first_wait_s=0.5, max_wait_s=3.0, random=lambda: 0.0)
    assert [policy.wait_s(failed) for failed in (1, 2, 3, 4, 50)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert RetryPolicy(first_wait_s=0.5, random=lambda: 1.0).wait_s(1) == 0.25


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT, errno.ESTALE])
def test_a_passing_error_of_a_disk_is_tried_again(
    number: int, tmp_path: Path, pauses: Pauses, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, left = os.fsync, [number, number]

    def fail_twice(descriptor: int) -> None:
        if left:
            raise OSError(left.pop(), "told to fail")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_twice)
    made = []
    assert storage.write_file(f"{tmp_path}/x", lambda: made.append(1) or [b"abc"], retries=pauses.policy) == 3
    assert (len(made), pauses.seconds) == (3, [0.5, 1.0])
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free space there, or choose a folder on another disk"),
        (errno.EDQUOT, "the quota of this user is used up"),
        (errno.EACCES, "give this user the right to it"),
        (errno.EROFS, "the disk is mounted read-only"),
    ],
)
def test_a_lasting_error_of_a_disk_is_not(
    number: int, fix: str, tmp_path: Path, pauses: Pauses, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    message = rf"could not write {tmp_path}/x \(tried once\): {os.strerror(number)}; {fix}"
    with pytest.raises(StorageError, match=message) as raised:
        storage.write_file(f"{tmp_path}/x", lambda: [b"abc"], retries=pauses.policy)
    assert raised.value.errno == number
    assert (os.listdir(tmp_path), pauses.seconds) == ([], [])


def test_giving_up_says_how_often_it_was_tried(tmp_path: Path, pauses: Pauses, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=r"\(tried 7 times\): Input/output error; look at the disk"):
        storage.write_file(f"{tmp_path}/x", lambda: [b"abc"], retries=pauses.policy)
    assert pauses.seconds == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    assert os.listdir(tmp_path) == []


FILL_A_DISK = """
import os, subprocess, sys
from papilio.trainer.storage.api import StorageError, list_folder, require_writable, write_file
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", sys.argv[1]]).returncode:
    sys.exit(3)
require_writable(sys.argv[1])
try:
    write_file(sys.argv[1] + "/x", lambda: [bytes(1 << 20)])
except StorageError as error:
    print(error)
print(list_folder(sys.argv[1]))
"""


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A real disk of 64 KiB, in a mount namespace of its own."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    command = [*unshare, sys.executable, "-c", FILL_A_DISK, str(tmp_path)]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("this machine has no unshare")
    if "unshare:" in done.stderr or done.returncode == 3:
        pytest.skip(f"this machine lets nobody mount: {done.stderr}")
    assert done.stdout.splitlines() == [
        f"could not write {tmp_path}/x (tried once): No space left on device; "
        "free space there, or choose a folder on another disk",
        "[]",
    ]


def test_a_file_longer_than_allowed(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; from papilio.trainer.storage.api import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "write_file(sys.argv[1] + '/x', lambda: [bytes(5000)])"
    )
    errors = run_python(code, str(tmp_path)).communicate()[1]
    assert f"could not write {tmp_path}/x (tried once): File too large; the file is larger than the disk or" in errors
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"create folder .*file/x \(tried once\): Not a directory; .* is a file"):
        storage.require_writable(f"{tmp_path}/file/x")


def test_no_permission() -> None:
    """As a user who is not root; outside of tmp_path, which only its owner may enter."""
    code = (
        "import os, sys; from papilio.trainer.storage.api import require_writable; os.getuid() or os.setuid(65534)\n"
        "require_writable(sys.argv[1])"
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        errors = run_python(code, folder).communicate()[1]
        os.chmod(folder, 0o755)
        assert os.listdir(folder) == []
    assert "(tried once): Permission denied; give this user the right to it, or choose another folder" in errors


def test_what_is_forbidden_is_not_taken_for_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(StorageError, match=r"could not look for /x.*Permission denied"):
        storage.exists("/x")


def test_a_pipe_where_a_file_belongs_is_refused_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "summary.json")
    os.mkfifo(path)
    said = "it is a pipe, socket or device, where a file belongs; check the storage"
    with pytest.raises(StorageError, match=f"could not read .*summary.json .*: {said}"):
        storage.read_json(path)
    with pytest.raises(StorageError, match=said):
        storage.read_into(memoryview(bytearray(4)), path, 0)
    for has_reader in (False, True):
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if has_reader else None
        appended = AppendedFile(path)
        appended.append(b"a record")
        appended.close()
        if reader is not None:
            os.close(reader)
    assert caplog.text.count("summary.json cannot be written: it is a pipe, socket or device") == 2


def test_a_file_and_its_name_are_flushed_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, replace = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        events.append("sync " + os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path)[:2])
        sync(descriptor)

    def note_replace(source: str, target: str) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    storage.make_folder(f"{tmp_path}/a/b")
    assert events == ["sync .", "sync a"]
    events.clear()
    storage.write_file(f"{tmp_path}/x", lambda: [b"abc"])
    assert events == ["sync x.", "rename", "sync ."]
