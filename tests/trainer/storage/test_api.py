import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from iopath.common.file_io import PathHandler

from papilio.data_pipeline.paths import path_manager
from papilio.trainer.storage import api as storage
from papilio.trainer.storage.api import StorageError
from tests.support.storages import LARGE, MIB, Pauses, read_range, run_python, tear


@pytest.fixture(params=["local", "file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder of each kind, that exists."""
    if request.param == "s3":
        return request.getfixturevalue("s3").url("runs/first")
    return str(tmp_path) if request.param == "local" else f"file://{tmp_path}"


# What holds for every storage


def test_a_file_comes_back_as_it_was_written(root: str) -> None:
    chunks = [b"ab", memoryview(b"cd"), b"", memoryview(bytes(8)).cast("q")]
    assert storage.write_file(f"{root}/x.bin", lambda: chunks) == 12
    assert storage.file_size(f"{root}/x.bin") == 12
    assert storage.read_bytes(f"{root}/x.bin") == b"abcd" + bytes(8)
    assert read_range(f"{root}/x.bin", 1, 3) == b"bcd"
    assert read_range(f"{root}/x.bin", 12, 0) == b""


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
    assert read_range(f"{root}/x.bin", 16 * MIB - 5, 10) == LARGE[16 * MIB - 5 : 16 * MIB + 5]
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
        read_range(f"{root}/x.bin", 1, 4)
    with pytest.raises(StorageError, match="3 bytes from offset 7 were asked for, 0 are there"):
        read_range(f"{root}/x.bin", 7, 3)


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
        lambda path: read_range(path, 1, 2, retries=pauses.policy),
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
from papilio.trainer.storage.api import write_file
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
        assert read_range("shelf://a/b/x.json", 0, 1) == b"["
        assert storage.list_folder("shelf://a") == ["b"]
        storage.remove_folder("shelf://a")
        assert (storage.exists("shelf://a/b/x.json"), storage.list_folder("shelf://b")) == (False, [])
        with pytest.raises(StorageError, match=r"could not read shelf://b/x.*check the path"):
            storage.read_bytes("shelf://b/x")
    finally:
        del path_manager._path_handlers["shelf://"]


def test_no_torch_and_boto3_only_for_s3() -> None:
    code = (
        "import sys, papilio.trainer.storage.api; assert 'boto3' not in sys.modules\n"
        "import papilio.trainer.storage.s3; print(sorted({'torch', 'boto3'} & set(sys.modules)))"
    )
    assert run_python(code).communicate()[0] == "['boto3']\n"


def test_without_boto3_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['boto3'] = None; from papilio.trainer.storage.api import exists; exists('s3://b/x')"
    errors = run_python(code).communicate()[1]
    assert 's3://b/x needs boto3, which is not installed; run: pip install "papilio[s3]"' in errors
