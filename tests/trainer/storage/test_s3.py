"""S3, as a stand-in on loopback answers: failures, silences, uploads cut short."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from papilio.data_pipeline.paths import path_manager
from papilio.trainer.storage import api as storage
from papilio.trainer.storage.api import StorageError
from tests.support.s3_stand_in import S3StandIn
from tests.support.storages import LARGE, MIB, Pauses, read_range


def test_free_bytes(tmp_path: Path, s3: S3StandIn) -> None:
    available = os.statvfs(tmp_path)
    free = storage.free_bytes(f"{tmp_path}/not/yet")
    assert free is not None
    assert abs(free - available.f_bavail * available.f_frsize) < 1 << 30
    assert storage.free_bytes(s3.url("x")) is None


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
    assert read_range(s3.url("x"), 5 * MIB, 100) == LARGE[5 * MIB : 5 * MIB + 100]
    assert [(request.method, request.range) for request in s3.faults.requests] == [("GET", "bytes=5242880-5242979")]


@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown"), (429, "TooManyRequests")])
def test_s3_failures_are_tried_again(status: int, code: str, s3: S3StandIn, pauses: Pauses) -> None:
    s3.faults.fail(2, "PUT", status, code)
    s3.faults.fail(3, "GET", status, code)
    storage.write_file(s3.url("x"), lambda: [b"abc"], retries=pauses.policy)
    assert read_range(s3.url("x"), 1, 2, retries=pauses.policy) == b"bc"
    assert (s3.faults.count("PUT"), s3.faults.count("GET")) == (3, 4)
    assert pauses.seconds == [0.5, 1.0, 0.5, 1.0, 2.0]


def test_s3_connections_that_close_are_tried_again(s3: S3StandIn, pauses: Pauses) -> None:
    s3.faults.hang_up(2, "PUT")
    storage.write_file(s3.url("x"), lambda: [LARGE[:MIB]], retries=pauses.policy)
    s3.faults.hang_up(1, "GET")
    assert storage.read_bytes(s3.url("x"), retries=pauses.policy) == LARGE[:MIB]
    s3.faults.hang_up(1, "GET")
    assert read_range(s3.url("x"), 10, 1000, retries=pauses.policy) == LARGE[10:1010]
    assert pauses.seconds == [0.5, 1.0, 0.5, 0.5]


def test_s3_silence_is_tried_again(s3: S3StandIn, pauses: Pauses, monkeypatch: pytest.MonkeyPatch) -> None:
    from papilio.trainer.storage import s3_client

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
    from papilio.trainer.storage import s3_client

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
