"""Objects of S3 as files: read by ranges, written whole or not at all."""

from __future__ import annotations

import errno
import io
import logging
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from botocore import exceptions

from papilio.trainer.storage.retries import RetryPolicy, StorageError, TryAgainError
from papilio.trainer.storage.s3_client import client, error_code, object_size, request, split

logger = logging.getLogger(__name__)

# An object has at most 10,000 parts, so a file at most 156 GiB. Memory of a file being written: 5 parts.
PART_BYTES = 16 << 20
NUM_UPLOADS = 4


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
