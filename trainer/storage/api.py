"""Bytes of runs and checkpoints: the one module of the trainer that knows where paths lead.

A path is a local one (plain or file://), s3://bucket/key, or has another scheme for which the application registered a
handler with data_pipeline.paths.path_manager. A file is written whole or not at all, and an operation that fails for
a transient reason is tried again; what fails for good is a StorageError. Nothing here imports torch.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from papilio.data_pipeline.paths import join, path_manager
from papilio.trainer.compat.iopath_internals import known_prefixes
from papilio.trainer.storage.local_files import (
    create_local,
    free_local_bytes,
    make_local_folder,
    odd_kind,
    read_local,
    read_local_into,
    remove_local_folder,
    remove_local_if_same,
    replace_local,
    write_local,
)
from papilio.trainer.storage.retries import DEFAULT_RETRIES, RetryPolicy, StorageError, TryAgainError, attempt

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_S3 = "s3://"
_PROBE = b"papilio\n"


def make_folder(path: str, *, retries: RetryPolicy = DEFAULT_RETRIES) -> None:
    """Create a folder and its parents, if need be."""
    local = _local_path(path)
    if local is not None:
        attempt("create folder", path, lambda: make_local_folder(local), retries)
    else:
        attempt("create folder", path, lambda: path_manager.mkdirs(path, **_options(path, retries)), retries)


def write_file(
    path: str, make_chunks: Callable[[], Iterable[bytes | memoryview]], *, retries: RetryPolicy = DEFAULT_RETRIES
) -> int:
    """Write a whole file, which is seen under its name only once it is complete and, on a local disk, flushed.

    Args:
        path: The file; an older one of that name is replaced. Its folder exists.
        make_chunks: Returns the bytes from the beginning; called once for every try.
        retries: How often to try.

    Returns:
        Bytes of the file, which the storage has confirmed.

    Raises:
        StorageError: it failed for good.
    """
    local = _local_path(path)
    if local is not None:
        return attempt("write", path, lambda: write_local(local, _flat(make_chunks())), retries)
    return attempt("write", path, lambda: _write_remote(path, _flat(make_chunks()), retries), retries)


def read_into(buffer: memoryview, path: str, offset: int, *, retries: RetryPolicy = DEFAULT_RETRIES) -> None:
    """Fill a buffer of bytes with those of a file from an offset on, and read no more than these.

    Raises:
        StorageError: it failed for good, or the file ends before.
    """
    local = _local_path(path)
    if local is not None:
        num_read = attempt("read", path, lambda: read_local_into(buffer, local, offset), retries)
    else:
        data = attempt("read", path, lambda: _read_remote(path, offset, len(buffer), retries), retries)
        num_read = len(data)
        buffer[:num_read] = data
    if num_read != len(buffer):
        wanted = f"{len(buffer)} bytes from offset {offset} were asked for, {num_read} are there"
        raise StorageError(f"could not read {path}: {wanted}; the file was cut short")


def read_bytes(path: str, *, retries: RetryPolicy = DEFAULT_RETRIES) -> bytes:
    """Read a whole file."""
    local = _local_path(path)
    if local is not None:
        return attempt("read", path, lambda: read_local(local), retries)
    return attempt("read", path, lambda: _read_remote(path, 0, -1, retries), retries)


def write_text(path: str, text: str, *, retries: RetryPolicy = DEFAULT_RETRIES) -> None:
    """Write a text file."""
    data = text.encode()
    write_file(path, lambda: [data], retries=retries)


def write_ephemeral(path: str, text: str, *, retries: RetryPolicy = DEFAULT_RETRIES) -> None:
    """Write a text file that is soon rewritten: whole or not at all, but not flushed to a local disk.

    Raises:
        StorageError: it failed for good.
    """
    local = _local_path(path)
    if local is None:
        write_text(path, text, retries=retries)
    else:
        attempt("write", path, lambda: replace_local(local, text.encode()), retries)


def is_remote(path: str) -> bool:
    """Whether a path leads to a storage that is not a local disk."""
    return _local_path(path) is None


def write_json(path: str, value: Any, *, retries: RetryPolicy = DEFAULT_RETRIES) -> None:
    """Write a value as indented JSON."""
    write_text(path, to_json(value, indent=1) + "\n", retries=retries)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON, which knows no NaN and no infinity: they become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(found) for key, found in value.items()}
    return [_finite(found) for found in value] if isinstance(value, list | tuple) else value


def create_file(path: str, data: bytes, *, retries: RetryPolicy = DEFAULT_RETRIES) -> bool:
    """Write a small file unless there is one of that name: of several who try at once, one succeeds.

    (Where a handler of the application serves the path, that is only likely.) Returns whether it was written.

    Raises:
        StorageError: it failed for good.
    """
    local = _local_path(path)
    if local is not None:
        return attempt("create", path, lambda: create_local(local, data), retries)
    if path.startswith(_S3):
        from papilio.trainer.storage.s3 import create_object

        return create_object(path, data, retries)
    if exists(path, retries=retries):
        return False
    write_file(path, lambda: [data], retries=retries)
    return True


def read_if_there(path: str, *, retries: RetryPolicy = DEFAULT_RETRIES) -> bytes | None:
    """Read a whole file; None if there is none.

    Raises:
        StorageError: it is there, and could not be read.
    """
    try:
        return read_bytes(path, retries=retries)
    except StorageError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise


def what_is_no_file(path: str, *, retries: RetryPolicy = DEFAULT_RETRIES) -> str | None:
    """Say what lies at a path where a file belongs, as in "a folder"; None for a file, or nothing."""
    local = _local_path(path)
    return None if local is None else attempt("look at", path, lambda: odd_kind(local), retries)


def remove_if_same(path: str, data: bytes, *, retries: RetryPolicy = DEFAULT_RETRIES) -> bool:
    """Remove a small file if it holds these bytes, and say so; atomic on a local disk and NFS alone."""
    local = _local_path(path)
    if local is not None:
        return attempt("remove", path, lambda: remove_local_if_same(local, data), retries)
    is_same = read_if_there(path, retries=retries) == data
    if is_same:
        remove_file(path, retries=retries)
    return is_same


def remove_empty_folder(path: str) -> None:
    """Remove a local folder that holds nothing; another one stays, as do an object store's, which are no things."""
    local = _local_path(path)
    if local is not None:
        with suppress(OSError):
            os.rmdir(local)


def read_json(path: str, *, retries: RetryPolicy = DEFAULT_RETRIES) -> Any:
    """Read a JSON file.

    Raises:
        StorageError: it could not be read, or is not JSON.
    """
    try:
        return json.loads(read_bytes(path, retries=retries))
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is not JSON ({error}); it is damaged, or not what its name says") from error


def exists(path: str, *, retries: RetryPolicy = DEFAULT_RETRIES) -> bool:
    """Say whether there is a file or a folder of that name."""
    local = _local_path(path)
    if local is not None:
        return attempt("look for", path, lambda: _exists_locally(local), retries)
    return attempt("look for", path, lambda: bool(path_manager.exists(path, **_options(path, retries))), retries)


def file_size(path: str, *, retries: RetryPolicy = DEFAULT_RETRIES) -> int:
    """Bytes of a file, as the storage reports."""
    local = _local_path(path)
    if local is not None:
        return attempt("look at", path, lambda: os.stat(local).st_size, retries)
    return attempt("look at", path, lambda: _remote_size(path, retries), retries)


def list_folder(path: str, *, retries: RetryPolicy = DEFAULT_RETRIES) -> list[str]:
    """Sorted names of the files and folders directly under a folder; none where there is no such folder."""
    local = _local_path(path)
    if local is None:
        return attempt("list", path, lambda: _list_remote(path, retries), retries)
    try:
        return sorted(attempt("list", path, lambda: os.listdir(local), retries))
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise


def remove_file(path: str, *, retries: RetryPolicy = DEFAULT_RETRIES) -> None:
    """Remove a file; a missing one is no error."""
    local = _local_path(path)
    if local is not None:
        attempt("remove", path, lambda: _unlink(local), retries)
    else:
        attempt("remove", path, lambda: path_manager.rm(path, **_options(path, retries)), retries)


def remove_folder(path: str, *, retries: RetryPolicy = DEFAULT_RETRIES) -> None:
    """Remove a folder and all that is under it; a missing one is no error."""
    local = _local_path(path)
    if local is not None:
        attempt("remove", path, lambda: remove_local_folder(local), retries)
    elif path.startswith(_S3):
        path_manager.rm(path.rstrip("/") + "/", **_options(path, retries))
    else:
        attempt("remove", path, lambda: _remove_remote_folder(path), retries)


def require_writable(folder: str, *, retries: RetryPolicy = DEFAULT_RETRIES) -> None:
    """Make sure that files can be written to a folder, before hours of work that end there; create it if need be.

    Raises:
        StorageError: they cannot, and what fixes that.
    """
    make_folder(folder, retries=retries)
    probe = join(folder, f".writable-{os.urandom(4).hex()}")
    write_file(probe, lambda: [_PROBE], retries=retries)
    if read_bytes(probe, retries=retries) != _PROBE:
        raise StorageError(f"{folder} gives back other bytes than were written; choose another folder")
    remove_file(probe, retries=retries)


def free_bytes(folder: str) -> int | None:
    """Bytes that can still be written to a folder, which need not exist yet; None where that is unknown."""
    local = _local_path(folder)
    return None if local is None else attempt("look at", folder, lambda: free_local_bytes(local))


def _local_path(path: str) -> str | None:
    """Path on a local disk, None for a path that a registered handler serves."""
    scheme = _SCHEME.match(path)
    if scheme is None:
        return path
    if scheme.group() == "file://":
        return path.removeprefix("file://")
    known = known_prefixes(path_manager)
    if _S3 not in known and scheme.group() == _S3:
        _register_s3(path)
    elif not any(path.startswith(prefix) for prefix in known):
        names = ", ".join(sorted({"file://", _S3, *known}))
        raise StorageError(f"no storage is known for {path}; use a plain path, or one of {names}")
    return None


def _register_s3(path: str) -> None:
    try:
        from papilio.trainer.storage.s3 import S3Handler
    except ModuleNotFoundError as error:
        message = f'{path} needs boto3, which is not installed; run: pip install "papilio[s3]"'
        raise StorageError(message) from error
    path_manager.register_handler(S3Handler())


def _options(path: str, retries: RetryPolicy) -> dict[str, Any]:
    """Keywords that our own handler understands; those of others refuse what they do not know."""
    return {"retries": retries} if path.startswith(_S3) else {}


def _flat(chunks: Iterable[bytes | memoryview]) -> Iterable[bytes | memoryview]:
    """The chunks that hold something, as bytes whatever the items of a view are."""
    for chunk in chunks:
        view = memoryview(chunk)
        if view.nbytes:
            yield view.cast("B")


def _write_remote(path: str, chunks: Iterable[bytes | memoryview], retries: RetryPolicy) -> int:
    num_bytes = 0
    with path_manager.open(path, "wb", **_options(path, retries)) as file:
        for chunk in chunks:
            file.write(chunk)
            num_bytes += len(chunk)
    stored = _remote_size(path, retries)
    if stored != num_bytes:
        path_manager.rm(path, **_options(path, retries))
        raise TryAgainError(f"{num_bytes} bytes were written, {stored} are stored")
    return num_bytes


def _read_remote(path: str, offset: int, length: int, retries: RetryPolicy) -> bytes:
    # Unbuffered: a buffer reads ahead, and a range is to cost what it holds.
    with path_manager.open(path, "rb", buffering=0, **_options(path, retries)) as file:
        file.seek(offset)
        pieces = [file.read(length)]
        while length > sum(map(len, pieces)) and pieces[-1]:
            pieces.append(file.read(length - sum(map(len, pieces))))
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _remote_size(path: str, retries: RetryPolicy) -> int:
    with path_manager.open(path, "rb", buffering=0, **_options(path, retries)) as file:
        return int(file.seek(0, os.SEEK_END))


def _list_remote(path: str, retries: RetryPolicy) -> list[str]:
    if not path.startswith(_S3) and not path_manager.exists(path):
        return []
    return sorted(path_manager.ls(path, **_options(path, retries)))


def _remove_remote_folder(path: str) -> None:
    if not path_manager.exists(path):
        return
    for name in path_manager.ls(path):
        child = join(path, name)
        if path_manager.isdir(child):
            _remove_remote_folder(child)
        else:
            path_manager.rm(child)


def _exists_locally(path: str) -> bool:
    try:
        os.stat(path)  # os.path.exists takes "forbidden" for "missing"
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
