"""Durable files on local disks: whole or absent, also after a power cut."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress

from papilio.trainer.storage.direct_io import open_direct, write_direct
from papilio.trainer.storage.retries import TryAgainError

_NO_FILE = "it is a pipe, socket or device, where a file belongs"
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)


def write_local(path: str, chunks: Iterable[bytes | memoryview]) -> int:
    """Write a file under a temporary name, flush it to the disk, then give it its name; return its bytes.

    Raises:
        OSError: it was not written; nothing is left behind.
        TryAgainError: fewer or more bytes are stored than were written.
    """
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        num_bytes = _write_new(temporary, chunks)
        _check_size(temporary, num_bytes)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(os.path.dirname(path))
    return num_bytes


def replace_local(path: str, data: bytes) -> None:
    """Write a file that readers see whole, the old one or the new; a power cut may lose it.

    Raises:
        OSError: it was not written; nothing is left behind.
    """
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def create_local(path: str, data: bytes) -> bool:
    """Write a small file unless there is one; O_EXCL holds on NFS too, where locks of files may not."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise
    return True


def odd_kind(path: str) -> str | None:
    """Say what lies at a path, if it is no regular file: to read it might never end, or lead elsewhere."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISREG(mode):
        return None
    return "a folder" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "a pipe, socket or device"


def remove_local_if_same(path: str, data: bytes) -> bool:
    """Remove a file if it holds these bytes. It is renamed first, so that of several who try one alone succeeds."""
    aside = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return False
    try:
        if read_local(aside) == data:
            return True
        with suppress(FileExistsError):
            os.link(aside, path)  # another's, written meanwhile: put it back
        return False
    finally:
        os.unlink(aside)


def make_local_folder(path: str) -> None:
    """Create a folder and its parents, if need be, so that they are still there after a power cut."""
    missing = []
    parent = os.path.abspath(path)
    while not os.path.isdir(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    os.makedirs(path, exist_ok=True)
    for folder in reversed(missing):
        sync_folder(os.path.dirname(folder))


def remove_local_folder(path: str) -> None:
    """Remove a folder and what is in it; what is missing, or goes away meanwhile, is no error."""
    while os.path.isdir(path):
        with suppress(FileNotFoundError):
            shutil.rmtree(path)
    sync_folder(os.path.dirname(os.path.abspath(path)))


def open_regular(path: str, flags: int = os.O_RDONLY) -> int:
    """Open a file of ours; what else lies there, as a pipe, is refused rather than waited for.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a pipe that nobody reads, a socket, a device that is none
            raise OSError(errno.EINVAL, _NO_FILE, path) from None
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, _NO_FILE, path)


def read_local(path: str) -> bytes:
    """Read a whole file."""
    with open(open_regular(path), "rb") as file:
        return file.read()


def read_local_into(buffer: memoryview, path: str, offset: int) -> int:
    """Fill a buffer from an offset on and return how many bytes were read: fewer only at the end of the file."""
    num_read = 0
    with open(open_regular(path), "rb", buffering=0) as file:
        file.seek(offset)
        while count := file.readinto(buffer[num_read:]):
            num_read += count
    return num_read


def sync_folder(path: str) -> None:
    """Flush the names in a folder to the disk. A missing folder, or a disk that cannot, is no error."""
    try:
        descriptor = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network disks refuse to sync folders, and keep names without
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def free_local_bytes(folder: str) -> int:
    """Bytes that this user may still write to the disk of a folder, which need not exist yet."""
    folder = os.path.abspath(folder)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


def _write_new(path: str, chunks: Iterable[bytes | memoryview]) -> int:
    """Write and flush a file that is not there yet; return its bytes."""
    descriptor = open_direct(path)
    if descriptor is not None:
        try:
            return write_direct(descriptor, chunks)
        finally:
            os.close(descriptor)
    with open(path, "wb") as file:
        num_bytes = sum(file.write(chunk) for chunk in chunks)
        file.flush()
        os.fsync(file.fileno())
        return num_bytes


def _check_size(path: str, num_bytes: int) -> None:
    stored = os.stat(path).st_size
    if stored != num_bytes:
        raise TryAgainError(f"{num_bytes} bytes were written, {stored} are stored")
