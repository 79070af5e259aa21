"""S3: objects as files, and the handler of s3:// paths for iopath.

Whole objects or none, ranges that cost what they hold, no error swallowed, retries by our own rules (s3_client.py).

iopath 0.1.10 has a handler of its own, which does not hold up here: it downloads a whole object to open it; uploads
what was written before an exception as if it were all; takes "forbidden" for "does not exist"; needs an AWS profile
named "saml"; and finds a folder only by a marker object. This one shares nothing with it but the interface.
"""

from __future__ import annotations

import errno
import io
import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import IO, Any

from botocore import exceptions
from iopath.common.file_io import PathHandler

from papilio.trainer.storage.retries import (
    DEFAULT_RETRIES,
    RetryPolicy,
    StorageError,
    TryAgainError,
)
from papilio.trainer.storage.s3_client import PREFIX, client, error_code, object_size, request, split

logger = logging.getLogger(__name__)

# An object has at most 10,000 parts, so a file at most 156 GiB. Memory of a file being written: 5 parts.
PART_BYTES = 16 << 20
NUM_UPLOADS = 4
READ_AHEAD_BYTES = 8 << 20
_IS_THERE = ("PreconditionFailed", "412")
# Services that know no conditions say so, or (not seen) take no notice of them.
_UNCONDITIONAL = ("NotImplemented", "501")


class S3Reader(io.RawIOBase):
    """An object as a file for reading: each read is one request for just that range."""

    def __init__(self, path: str, retries: RetryPolicy) -> None:
        self._path = path
        self._retries = retries
        self._offset = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Offset of the next read."""
        return self._offset

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to an offset; only from the end does that cost a request."""
        if whence == os.SEEK_CUR:
            offset += self._offset
        elif whence == os.SEEK_END:
            size = object_size(self._path, self._retries)
            if size is None:
                raise StorageError(
                    f"could not look at {self._path}: there is no such object; check the path", errno.ENOENT
                )
            offset += size
        if offset < 0:
            raise ValueError(f"offset {offset} is before the beginning of {self._path}")
        self._offset = offset
        return offset

    def read(self, size: int | None = -1) -> bytes:
        """Read up to `size` bytes, fewer only at the end; all that is left with -1."""
        if size == 0:
            return b""
        data = request("read", self._path, lambda: self._get(-1 if size is None else size), self._retries)
        self._offset += len(data)
        return data

    def readall(self) -> bytes:
        """Read all that is left."""
        return self.read(-1)

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; return the number of bytes."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def _get(self, size: int) -> bytes:
        bucket, key = split(self._path)
        last = "" if size < 0 else self._offset + size - 1
        wanted = {} if self._offset == 0 and size < 0 else {"Range": f"bytes={self._offset}-{last}"}
        try:
            response = client().get_object(Bucket=bucket, Key=key, **wanted)
        except exceptions.ClientError as error:
            if error_code(error) in ("InvalidRange", "416"):
                return b""  # at the end, or the object is empty
            raise
        body = response["Body"]  # as a context manager it would be a bare stream, which does not check its length
        try:
            if wanted and "ContentRange" not in response:
                body.read(self._offset)  # a service that ignores ranges sends the whole object
                return bytes(body.read(None if size < 0 else size))
            return bytes(body.read())
        finally:
            body.close()


class S3Writer(io.RawIOBase):
    """An object as a file for writing, stored at close(), or not at all if the `with` block fails.

    What fits one part is one request; more is a multipart upload, whose parts go out NUM_UPLOADS at a time.
    """

    def __init__(self, path: str, retries: RetryPolicy) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._upload_id: str | None = None
        self._path = path
        self._retries = retries
        self._buffer = bytearray()
        self._num_parts = 0
        self._waiting: deque[Future[dict[str, Any]]] = deque()
        self._parts: list[dict[str, Any]] = []
        self._bucket, self._key = split(path)

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, data: Any) -> int:
        """Take bytes; a full part goes out in the background."""
        view = memoryview(data).cast("B")
        taken = 0
        while taken < len(view):
            piece = view[taken : taken + PART_BYTES - len(self._buffer)]
            self._buffer += piece
            taken += len(piece)
            if len(self._buffer) == PART_BYTES:
                self._send_part()
        return taken

    def close(self) -> None:
        """Store the object, if that was not done or given up before."""
        if self.closed:
            return
        try:
            if self._upload_id is None:
                self._put()
            else:
                self._complete()
        except BaseException:
            self.give_up()
            raise
        self._release()

    def give_up(self) -> None:
        """Forget what was written: the object stays as it was."""
        if self.closed:
            return
        self._release()
        if self._upload_id is None:
            return
        try:
            client().abort_multipart_upload(Bucket=self._bucket, Key=self._key, UploadId=self._upload_id)
        except Exception as error:  # the reason for giving up is the one to report
            logger.warning("an unfinished upload of %s may be left behind, at its cost: %s", self._path, error)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.give_up()

    def __del__(self) -> None:
        # A file that nobody closed is not complete; the base class would close it here.
        self.give_up()

    def _put(self) -> None:
        self._ask("put_object", Body=self._buffer)

    def _send_part(self) -> None:
        if self._upload_id is None:
            self._upload_id = self._ask("create_multipart_upload")["UploadId"]
            self._pool = ThreadPoolExecutor(NUM_UPLOADS, thread_name_prefix="s3-upload")
        assert self._pool is not None
        if len(self._waiting) == NUM_UPLOADS:
            self._parts.append(self._waiting.popleft().result())
        self._num_parts += 1
        self._waiting.append(self._pool.submit(self._upload_part, self._num_parts, self._buffer))
        self._buffer = bytearray()

    def _upload_part(self, number: int, data: bytearray) -> dict[str, Any]:
        stored = self._ask("upload_part", UploadId=self._upload_id, PartNumber=number, Body=data)
        checksums = {name: value for name, value in stored.items() if name == "ChecksumCRC32"}
        return {"PartNumber": number, "ETag": stored["ETag"], **checksums}

    def _complete(self) -> None:
        if self._buffer:
            self._send_part()
        self._parts += [part.result() for part in self._waiting]
        try:
            self._ask("complete_multipart_upload", UploadId=self._upload_id, MultipartUpload={"Parts": self._parts})
        except StorageError as error:
            cause = error.__cause__
            # The answer to an earlier try was lost: whether that one stored the object is not certain.
            if isinstance(cause, exceptions.ClientError) and error_code(cause) == "NoSuchUpload":
                raise TryAgainError(str(cause)) from error
            raise

    def _release(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._buffer = bytearray()
        super().close()

    def _ask(self, method: str, **arguments: Any) -> Any:
        def ask() -> Any:
            return getattr(client(), method)(Bucket=self._bucket, Key=self._key, **arguments)

        return request("write", self._path, ask, self._retries)


class TextWriter(io.TextIOWrapper):
    """Text on its way to an S3Writer."""

    def __init__(self, writer: S3Writer, **text: Any) -> None:
        super().__init__(writer, write_through=True, **text)  # type: ignore[arg-type]
        self._writer = writer

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is not None:
            self._writer.give_up()
        else:
            self.close()


class S3Handler(PathHandler):  # type: ignore[misc]  # iopath has no types
    """Serves s3:// paths to a PathManager. Every method takes `retries=`, a RetryPolicy.

    Folders are what the keys make them: there are no marker objects, and creating one does nothing.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _open(
        self, path: str, mode: str = "r", buffering: int = -1, retries: RetryPolicy = DEFAULT_RETRIES, **kwargs: Any
    ) -> IO[Any]:
        text = {name: kwargs.pop(name) for name in ("encoding", "errors", "newline") if name in kwargs}
        self._check_kwargs(kwargs)
        if mode not in ("r", "rb", "w", "wb"):
            raise ValueError(f'{path} cannot be opened with mode "{mode}"; S3 has "r", "rb", "w" and "wb"')
        file: Any = S3Writer(path, retries) if "w" in mode else S3Reader(path, retries)
        if "w" in mode:
            return file if "b" in mode else TextWriter(file, **{"encoding": "utf-8", **text})
        if buffering != 0:
            file = io.BufferedReader(file, READ_AHEAD_BYTES)
        return file if "b" in mode else io.TextIOWrapper(file, **{"encoding": "utf-8", **text})

    def _exists(self, path: str, retries: RetryPolicy = DEFAULT_RETRIES, **kwargs: Any) -> bool:
        return self._isfile(path, retries, **kwargs) or self._isdir(path, retries, **kwargs)

    def _isfile(self, path: str, retries: RetryPolicy = DEFAULT_RETRIES, **kwargs: Any) -> bool:
        self._check_kwargs(kwargs)
        return not path.endswith("/") and bool(split(path)[1]) and object_size(path, retries) is not None

    def _isdir(self, path: str, retries: RetryPolicy = DEFAULT_RETRIES, **kwargs: Any) -> bool:
        self._check_kwargs(kwargs)
        pages = _pages("look for", path, retries, MaxKeys=1)
        return any(page.get("Contents") for page in pages)

    def _ls(self, path: str, retries: RetryPolicy = DEFAULT_RETRIES, **kwargs: Any) -> list[str]:
        self._check_kwargs(kwargs)
        start = len(_folder_key(path))
        names: set[str] = set()
        for page in _pages("list", path, retries, Delimiter="/"):
            names.update(entry["Key"][start:] for entry in page.get("Contents", []))
            names.update(entry["Prefix"][start:-1] for entry in page.get("CommonPrefixes", []))
        return sorted(names - {""})

    def _mkdirs(self, path: str, retries: RetryPolicy = DEFAULT_RETRIES, **kwargs: Any) -> None:
        self._check_kwargs(kwargs)
        split(path)

    def _rm(self, path: str, retries: RetryPolicy = DEFAULT_RETRIES, **kwargs: Any) -> None:
        """Remove an object; with a "/" at the end, all objects under it."""
        self._check_kwargs(kwargs)
        if path.endswith("/"):
            _remove_all(path, retries)
        else:
            bucket, key = split(path)
            request("remove", path, lambda: client().delete_object(Bucket=bucket, Key=key), retries)


def create_object(path: str, data: bytes, retries: RetryPolicy) -> bool:
    """Store an object unless there is one of that name, and say so: of several who try at once, one succeeds."""
    bucket, key = split(path)

    def put() -> bool:
        try:
            client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except exceptions.ClientError as error:
            if error_code(error) in _IS_THERE:
                # Maybe by an earlier try of this one, whose answer was lost.
                return bool(client().get_object(Bucket=bucket, Key=key)["Body"].read() == data)
            if error_code(error) == "ConditionalRequestConflict":  # another one is storing it at this moment
                raise TryAgainError(str(error)) from error
            if error_code(error) not in _UNCONDITIONAL:
                raise
            if object_size(path, retries) is not None:
                return False
            client().put_object(Bucket=bucket, Key=key, Body=data)
        if client().get_object(Bucket=bucket, Key=key)["Body"].read() != data:
            client().delete_object(Bucket=bucket, Key=key)
            raise TryAgainError("other bytes are stored than were written")
        return True

    return request("create", path, put, retries)


def _folder_key(path: str) -> str:
    key = split(path)[1].rstrip("/")
    return f"{key}/" if key else ""


def _pages(operation: str, path: str, retries: RetryPolicy, **options: Any) -> Iterator[dict[str, Any]]:
    """Answers of a listing, 1000 keys each; only the first with MaxKeys."""
    wanted = {"Bucket": split(path)[0], "Prefix": _folder_key(path), **options}
    while True:
        page = request(operation, path, lambda: client().list_objects_v2(**wanted), retries)
        yield page
        if not page.get("IsTruncated") or "MaxKeys" in options:
            return
        wanted["ContinuationToken"] = page["NextContinuationToken"]


def _remove_all(path: str, retries: RetryPolicy) -> None:
    bucket, prefix = split(path)[0], _folder_key(path)
    if not prefix:
        raise StorageError(f"{path} is a whole bucket, which is not emptied; name a folder in it")

    def remove(keys: list[dict[str, str]]) -> None:
        answer = client().delete_objects(Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
        if answer.get("Errors"):
            raise exceptions.ClientError({"Error": answer["Errors"][0]}, "DeleteObjects")

    for page in list(_pages("list", path, retries)):
        keys = [{"Key": entry["Key"]} for entry in page.get("Contents", [])]
        if keys:
            request("remove", path, partial(remove, keys), retries)
    _abort_uploads(bucket, prefix)


def _abort_uploads(bucket: str, prefix: str) -> None:
    """Drop what killed processes had uploaded: no listing shows these parts, and they are paid for."""
    try:
        for page in client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            for upload in page.get("Uploads", []):
                if upload["Key"].startswith(prefix):  # some services take a prefix for a key
                    client().abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    except (exceptions.ClientError, exceptions.BotoCoreError) as error:  # the objects are gone, which is what counts
        logger.warning(
            "unfinished uploads under s3://%s/%s may be left behind, at their cost: %s", bucket, prefix, error
        )
