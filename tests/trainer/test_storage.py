import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from iopath.common.file_io import PathHandler

from data_pipeline.paths import path_manager
from tests.support.s3_stand_in import S3StandIn
from trainer import storage
from trainer.retries import RetryPolicy
from trainer.storage import StorageError

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 1 << 20
# More than one part of an upload, so that it is a multipart one.
LARGE = bytes(range(256)) * (17 * MIB // 256) + b"the end"


class Pauses:
    """Retries without waiting, which notes how long it would have waited."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.policy = RetryPolicy(sleep=self.seconds.append, random=lambda: 0.0)


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


@pytest.fixture(params=["local", "file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder of each kind, that exists."""
    if request.param == "s3":
        return request.getfixturevalue("s3").url("runs/first")
    return str(tmp_path) if request.param == "local" else f"file://{tmp_path}"


def run_python(code: str, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        env=os.environ | (environment or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def tear(chunk: bytes) -> Iterator[bytes]:
    yield chunk
    raise RuntimeError("the source broke")


# What holds for every storage


def test_a_file_comes_back_as_it_was_written(root: str) -> None:
    chunks = [b"ab", memoryview(b"cd"), b"", memoryview(bytes(8)).cast("q")]
    assert storage.write_file(f"{root}/x.bin", lambda: chunks) == 12
    assert storage.file_size(f"{root}/x.bin") == 12
    assert storage.read_bytes(f"{root}/x.bin") == b"abcd" + bytes(8)
    assert storage.read_range(f"{root}/x.bin", 1, 3) == b"bcd"
    assert storage.read_range(f"{root}/x.bin", 12, 0) == b""


def test_a_file_is_replaced_as_a_whole(root: str) -> None:
    storage.write_file(f"{root}/x.bin", lambda: [b"older and longer"])
    storage.write_file(f"{root}/x.bin", lambda: [b"new"])
    assert storage.read_bytes(f"{root}/x.bin") == b"new"
    assert storage.list_folder(root) == ["x.bin"]


def test_an_empty_file(root: str) -> None:
    assert storage.write_file(f"{root}/empty", lambda: []) == 0
    assert storage.read_bytes(f"{root}/empty") == b""
    assert storage.exists(f"{root}/empty")


def test_a_large_file(root: str) -> None:
    assert storage.write_file(f"{root}/x.bin", lambda: [LARGE[:MIB], LARGE[MIB:]]) == len(LARGE)
    assert storage.read_range(f"{root}/x.bin", 16 * MIB - 5, 10) == LARGE[16 * MIB - 5 : 16 * MIB + 5]
    assert storage.read_bytes(f"{root}/x.bin") == LARGE


def test_text_and_json(root: str) -> None:
    storage.write_text(f"{root}/x.txt", "grün\n")
    storage.write_json(f"{root}/x.json", {"a": [1, 2]})
    assert storage.read_bytes(f"{root}/x.txt") == "grün\n".encode()
    assert json.loads(storage.read_bytes(f"{root}/x.json")) == storage.read_json(f"{root}/x.json") == {"a": [1, 2]}


@pytest.mark.parametrize("data", [b'{"a": ', b"\xff\xfe"])
def test_damaged_json_is_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(StorageError, match=r"x\.json is not JSON \(.*\); it is damaged"):
        storage.read_json(f"{tmp_path}/x.json")


def test_a_range_beyond_the_end_is_an_error(root: str) -> None:
    storage.write_file(f"{root}/x.bin", lambda: [b"abc"])
    with pytest.raises(StorageError, match=r"x\.bin: 4 bytes from offset 1 were asked for, 2 are there; .* cut short"):
        storage.read_range(f"{root}/x.bin", 1, 4)
    with pytest.raises(StorageError, match="3 bytes from offset 7 were asked for, 0 are there"):
        storage.read_range(f"{root}/x.bin", 7, 3)


def test_folders_are_listed_by_name(root: str) -> None:
    for name in ("b/inner", "a", "c"):
        storage.make_folder(f"{root}/b")
        storage.write_file(f"{root}/{name}", lambda: [b"1"])
    assert storage.list_folder(root) == storage.list_folder(root + "/") == ["a", "b", "c"]
    assert storage.list_folder(f"{root}/b") == ["inner"]
    assert storage.list_folder(f"{root}/missing") == []


def test_a_folder_goes_with_all_under_it_and_nothing_beside(root: str) -> None:
    storage.make_folder(f"{root}/old/inner")
    storage.make_folder(f"{root}/older")
    for name in ("old/x", "old/inner/y", "older/z"):
        storage.write_file(f"{root}/{name}", lambda: [b"1"])
    storage.remove_folder(f"{root}/old")
    assert storage.list_folder(root) == ["older"]
    assert not storage.exists(f"{root}/old")
    assert storage.exists(f"{root}/older")
    storage.remove_folder(f"{root}/old")


def test_a_file_is_removed_once_or_twice(root: str) -> None:
    storage.write_file(f"{root}/x", lambda: [b"1"])
    storage.remove_file(f"{root}/x")
    assert not storage.exists(f"{root}/x")
    storage.remove_file(f"{root}/x")


def test_a_missing_file_is_named(root: str, pauses: Pauses) -> None:
    actions: list[Callable[[str], Any]] = [
        lambda path: storage.read_bytes(path, retries=pauses.policy),
        lambda path: storage.read_range(path, 1, 2, retries=pauses.policy),
        lambda path: storage.file_size(path, retries=pauses.policy),
    ]
    for action in actions:
        with pytest.raises(StorageError, match=r"runs/first/gone|/gone") as raised:
            action(f"{root}/gone")
        assert "check the path" in str(raised.value)
        assert raised.value.errno == errno.ENOENT
    assert pauses.seconds == []


def test_a_source_that_breaks_leaves_the_older_file(root: str, pauses: Pauses) -> None:
    storage.write_file(f"{root}/x", lambda: [b"older"])
    for chunk in (b"half", LARGE):
        with pytest.raises(RuntimeError, match="the source broke"):
            storage.write_file(f"{root}/x", lambda chunk=chunk: tear(chunk), retries=pauses.policy)
    assert storage.read_bytes(f"{root}/x") == b"older"
    assert storage.list_folder(root) == ["x"]
    assert pauses.seconds == []


def test_a_writable_folder_is_created_and_left_empty(root: str) -> None:
    storage.require_writable(f"{root}/a/b")
    assert storage.list_folder(f"{root}/a/b") == []


HALF_A_FILE = """
import sys
from trainer.storage import write_file
def chunks():
    for chunk in (bytes(20 << 20), b"more"):
        yield chunk
        print("wrote", flush=True)
        sys.stdin.readline()
write_file(sys.argv[1], chunks)
"""


def test_a_killed_writer_leaves_nothing_under_the_name(root: str) -> None:
    child = run_python(HALF_A_FILE, f"{root}/x")
    assert child.stdout is not None
    assert child.stdout.readline() == "wrote\n", child.communicate()[1]
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not storage.exists(f"{root}/x")
    storage.write_file(f"{root}/x", lambda: [b"after"])
    assert storage.read_bytes(f"{root}/x") == b"after"


# Retries


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
    ("number", "mend"),
    [
        (errno.ENOSPC, "free space there, or choose a folder on another disk"),
        (errno.EDQUOT, "the quota of this user is used up"),
        (errno.EACCES, "give this user the right to it"),
        (errno.EROFS, "the disk is mounted read-only"),
    ],
)
def test_a_lasting_error_of_a_disk_is_not(
    number: int, mend: str, tmp_path: Path, pauses: Pauses, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    message = rf"could not write {tmp_path}/x \(tried once\): {os.strerror(number)}; {mend}"
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


# Local disks

FILL_A_DISK = """
import os, subprocess, sys
from trainer.storage import StorageError, list_folder, require_writable, write_file
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
        "import resource, signal, sys; from trainer.storage import *\n"
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
        "import os, sys; from trainer.storage import require_writable; os.getuid() or os.setuid(65534)\n"
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


def test_free_bytes(tmp_path: Path, s3: S3StandIn) -> None:
    available = os.statvfs(tmp_path)
    free = storage.free_bytes(f"{tmp_path}/not/yet")
    assert free is not None
    assert abs(free - available.f_bavail * available.f_frsize) < 1 << 30
    assert storage.free_bytes(s3.url("x")) is None


# S3


def test_s3_objects_are_plain_objects(s3: S3StandIn) -> None:
    """The oracle is boto3 itself."""
    storage.make_folder(s3.url("a"))
    storage.write_file(s3.url("a/small"), lambda: [b"ab", b"c"])
    storage.write_file(s3.url("a/large"), lambda: [LARGE])
    listed = s3.client.list_objects_v2(Bucket=s3.bucket)["Contents"]
    assert {entry["Key"]: entry["Size"] for entry in listed} == {"a/large": len(LARGE), "a/small": 3}
    assert s3.client.get_object(Bucket=s3.bucket, Key="a/large")["Body"].read() == LARGE
    assert [s3.faults.count("PUT", name) for name in ("small", "large")] == [1, 2]


def test_s3_lists_and_removes_more_than_a_page(s3: S3StandIn) -> None:
    names = [f"f{number:05}" for number in range(2100)]
    s3.fill([f"many/{name}" for name in names] + [f"many/g{name}/x" for name in names[:5]] + ["manyfold"])
    assert storage.list_folder(s3.url("many")) == sorted(names + [f"g{name}" for name in names[:5]])
    storage.remove_folder(s3.url("many"))
    assert storage.list_folder(s3.url()) == ["manyfold"]


def test_s3_ranges_fetch_only_what_they_hold(s3: S3StandIn) -> None:
    storage.write_file(s3.url("x"), lambda: [LARGE])
    s3.faults.clear()
    assert storage.read_range(s3.url("x"), 5 * MIB, 100) == LARGE[5 * MIB : 5 * MIB + 100]
    assert [(request.method, request.range) for request in s3.faults.requests] == [("GET", "bytes=5242880-5242979")]


@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown"), (429, "TooManyRequests")])
def test_s3_failures_are_tried_again(status: int, code: str, s3: S3StandIn, pauses: Pauses) -> None:
    s3.faults.fail(2, "PUT", status, code)
    s3.faults.fail(3, "GET", status, code)
    storage.write_file(s3.url("x"), lambda: [b"abc"], retries=pauses.policy)
    assert storage.read_range(s3.url("x"), 1, 2, retries=pauses.policy) == b"bc"
    assert (s3.faults.count("PUT"), s3.faults.count("GET")) == (3, 4)
    assert pauses.seconds == [0.5, 1.0, 0.5, 1.0, 2.0]


def test_s3_connections_that_close_are_tried_again(s3: S3StandIn, pauses: Pauses) -> None:
    s3.faults.hang_up(2, "PUT")
    storage.write_file(s3.url("x"), lambda: [LARGE[:MIB]], retries=pauses.policy)
    s3.faults.hang_up(1, "GET")
    assert storage.read_bytes(s3.url("x"), retries=pauses.policy) == LARGE[:MIB]
    s3.faults.hang_up(1, "GET")
    assert storage.read_range(s3.url("x"), 10, 1000, retries=pauses.policy) == LARGE[10:1010]
    assert pauses.seconds == [0.5, 1.0, 0.5, 0.5]


def test_s3_silence_is_tried_again(s3: S3StandIn, pauses: Pauses, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import s3_client

    storage.write_file(s3.url("x"), lambda: [b"abc"])
    monkeypatch.setattr(s3_client, "READ_TIMEOUT_S", 0.2)
    s3_client._client_of_process.cache_clear()
    s3.faults.be_slow(1, "GET", seconds=0.8)
    assert storage.read_bytes(s3.url("x"), retries=pauses.policy) == b"abc"
    s3_client._client_of_process.cache_clear()
    assert pauses.seconds == [0.5]


def test_s3_sends_only_the_failed_part_again(s3: S3StandIn, pauses: Pauses) -> None:
    s3.faults.fail(2, "PUT", matching="partNumber=2")
    made = []
    storage.write_file(s3.url("x"), lambda: made.append(1) or [LARGE], retries=pauses.policy)
    assert storage.read_bytes(s3.url("x")) == LARGE
    parts = [request.query["partNumber"] for request in s3.faults.requests if request.method == "PUT"]
    assert (sorted(parts), len(made)) == (["1", "2", "2", "2"], 1)


@pytest.mark.parametrize("data", [b"0123456789", LARGE], ids=["one request", "parts"])
def test_s3_uploads_cut_short_are_noticed(data: bytes, s3: S3StandIn, pauses: Pauses) -> None:
    s3.faults.truncate(2)
    made = []
    storage.write_file(s3.url("x"), lambda: made.append(1) or [data], retries=pauses.policy)
    assert s3.client.get_object(Bucket=s3.bucket, Key="x")["Body"].read() == data
    assert 2 <= len(made) <= 3


def test_s3_uploads_always_cut_short_are_reported_and_not_left(s3: S3StandIn, pauses: Pauses) -> None:
    s3.faults.truncate(100)
    with pytest.raises(StorageError, match=r"write s3://.*/x \(tried 7 times\): 10 bytes were written, 5 are stored"):
        storage.write_file(s3.url("x"), lambda: [b"0123456789"], retries=pauses.policy)
    assert "Contents" not in s3.client.list_objects_v2(Bucket=s3.bucket)


def test_s3_answers_lost_after_the_last_part_do_no_harm(s3: S3StandIn, pauses: Pauses) -> None:
    s3.faults.lose_answer(1, "POST", matching="uploadId=")
    storage.write_file(s3.url("x"), lambda: [LARGE], retries=pauses.policy)
    assert s3.client.get_object(Bucket=s3.bucket, Key="x")["Body"].read() == LARGE


def test_s3_gives_up_with_the_reason_and_leaves_no_parts(s3: S3StandIn, pauses: Pauses) -> None:
    s3.faults.fail(7, "PUT", matching="partNumber=2")
    with pytest.raises(StorageError, match=r"write s3://.*/x \(tried 7 times\): .*SlowDown.*; check the bucket"):
        storage.write_file(s3.url("x"), lambda: [LARGE], retries=pauses.policy)
    assert not storage.exists(s3.url("x"))
    assert "Uploads" not in s3.client.list_multipart_uploads(Bucket=s3.bucket)


def test_s3_parts_of_killed_writers_go_with_the_folder(s3: S3StandIn) -> None:
    for key in ("run/x", "other"):
        s3.client.create_multipart_upload(Bucket=s3.bucket, Key=key)
    storage.remove_folder(s3.url("run"))
    assert [upload["Key"] for upload in s3.client.list_multipart_uploads(Bucket=s3.bucket)["Uploads"]] == ["other"]


def test_s3_forbidden_is_neither_tried_again_nor_taken_for_missing(s3: S3StandIn, pauses: Pauses) -> None:
    for method in ("PUT", "HEAD", "GET", "DELETE"):
        s3.faults.fail(1, method, 403, "AccessDenied")
    actions: list[Callable[[str], Any]] = [
        lambda path: storage.write_file(path, lambda: [b"a"], retries=pauses.policy),
        lambda path: storage.exists(path, retries=pauses.policy),
        lambda path: storage.list_folder(path, retries=pauses.policy),
        lambda path: storage.remove_file(path, retries=pauses.policy),
    ]
    for action in actions:
        with pytest.raises(
            StorageError, match=r"\(tried once\): .*(403|AccessDenied).*; check the credentials"
        ) as raised:
            action(s3.url("x"))
        assert raised.value.errno == errno.EACCES
    assert pauses.seconds == []


def test_s3_without_the_bucket(s3: S3StandIn, pauses: Pauses) -> None:
    actions: list[Callable[[str], Any]] = [
        lambda path: storage.require_writable(path, retries=pauses.policy),
        lambda path: storage.exists(path, retries=pauses.policy),
        lambda path: storage.list_folder(path, retries=pauses.policy),
    ]
    for action in actions:
        with pytest.raises(
            StorageError, match=r"\(tried once\): .*NoSuchBucket.*; create the bucket, or correct its name"
        ):
            action("s3://no-such-bucket/x")
    with pytest.raises(StorageError, match="s3:///x names no bucket; write s3://bucket/folder"):
        storage.exists("s3:///x")
    assert pauses.seconds == []


def test_s3_is_not_emptied_by_mistake(s3: S3StandIn) -> None:
    with pytest.raises(StorageError, match="is a whole bucket, which is not emptied"):
        storage.remove_folder(s3.url())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"},
            r"\(tried once\): Unable to locate credentials; set AWS_ACCESS_KEY_ID",
        ),
        ({"AWS_PROFILE": "nobody"}, r"\(tried once\): The config profile \(nobody\) could not be found; check the AWS"),
        ({"AWS_ENDPOINT_URL": "nowhere"}, r"\(tried once\): Invalid endpoint: nowhere; check the AWS configuration"),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            r"\(tried 7 times\): .*127\.0\.0\.1:9.*; check the network and AWS",
        ),
    ],
    ids=["no credentials", "no profile", "bad endpoint", "no endpoint"],
)
def test_s3_misconfigured(
    settings: dict[str, str], message: str, s3: S3StandIn, pauses: Pauses, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer import s3_client

    for name, value in settings.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    s3_client._client_of_process.cache_clear()
    try:
        with pytest.raises(StorageError, match=message):
            storage.require_writable(s3.url("x"), retries=pauses.policy)
    finally:
        s3_client._client_of_process.cache_clear()


def test_s3_paths_work_in_iopath(s3: S3StandIn) -> None:
    storage.exists(s3.url("x"))
    with path_manager.open(s3.url("x.txt"), "w") as file:
        file.write("one\ntwo\n")
    with path_manager.open(s3.url("x.txt")) as file:
        assert list(file) == ["one\n", "two\n"]
    with pytest.raises(RuntimeError), path_manager.open(s3.url("x.txt"), "w") as file:
        file.write("half")
        raise RuntimeError
    with path_manager.open(s3.url("x.txt"), "rb") as file:
        assert (file.seek(-4, os.SEEK_END), file.read(3), file.read()) == (4, b"two", b"\n")
    abandoned = path_manager.open(s3.url("abandoned"), "wb")
    abandoned.write(b"half")
    del abandoned
    assert (path_manager.ls(s3.url()), path_manager.isdir(s3.url("x.txt"))) == (["x.txt"], False)
    with pytest.raises(ValueError, match='cannot be opened with mode "a"; S3 has "r", "rb", "w" and "wb"'):
        path_manager.open(s3.url("x.txt"), "a")


# Schemes


def test_an_unknown_scheme_names_the_known_ones() -> None:
    for action in (storage.exists, storage.require_writable, storage.list_folder):
        with pytest.raises(
            StorageError, match=r"no storage is known for gs://x; use a plain path, or .*file://, s3://"
        ):
            action("gs://x")


class ShelfHandler(PathHandler):  # type: ignore[misc]
    """A storage of an application's own, with what iopath asks for and no more."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def _get_supported_prefixes(self) -> list[str]:
        return ["shelf://"]

    def _at(self, path: str, arguments: dict[str, Any]) -> Path:
        self._check_kwargs(arguments)
        return self._folder / path.removeprefix("shelf://")

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        return open(self._at(path, kwargs), mode, buffering)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return self._at(path, kwargs).exists()

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        return self._at(path, kwargs).is_dir()

    def _ls(self, path: str, **kwargs: Any) -> list[str]:
        return os.listdir(self._at(path, kwargs))

    def _mkdirs(self, path: str, **kwargs: Any) -> None:
        self._at(path, kwargs).mkdir(parents=True, exist_ok=True)

    def _rm(self, path: str, **kwargs: Any) -> None:
        self._at(path, kwargs).unlink()


def test_a_handler_of_the_application_serves_its_scheme(tmp_path: Path) -> None:
    path_manager.register_handler(ShelfHandler(tmp_path))
    try:
        storage.require_writable("shelf://a/b")
        storage.write_json("shelf://a/b/x.json", [1])
        assert storage.read_json("shelf://a/b/x.json") == [1]
        assert storage.read_range("shelf://a/b/x.json", 0, 1) == b"["
        assert storage.list_folder("shelf://a") == ["b"]
        storage.remove_folder("shelf://a")
        assert (storage.exists("shelf://a/b/x.json"), storage.list_folder("shelf://b")) == (False, [])
        with pytest.raises(StorageError, match=r"could not read shelf://b/x.*check the path"):
            storage.read_bytes("shelf://b/x")
    finally:
        del path_manager._path_handlers["shelf://"]


def test_no_torch_and_boto3_only_for_s3() -> None:
    code = (
        "import sys, trainer.storage; assert 'boto3' not in sys.modules\n"
        "import trainer.s3_storage; print(sorted({'torch', 'boto3'} & set(sys.modules)))"
    )
    assert run_python(code).communicate()[0] == "['boto3']\n"


def test_without_boto3_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['boto3'] = None; from trainer.storage import exists; exists('s3://b/x')"
    errors = run_python(code).communicate()[1]
    assert 's3://b/x needs boto3, which is not installed; run: pip install "papilio[s3]"' in errors
