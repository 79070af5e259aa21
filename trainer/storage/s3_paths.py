"""s3:// paths for iopath: whole objects or none, ranges that cost what they hold, no error swallowed.

iopath 0.1.10 has a handler of its own, which does not hold up here: it downloads a whole object to open it; uploads
what was written before an exception as if it were all; takes "forbidden" for "does not exist"; needs an AWS profile
named "saml"; and finds a folder only by a marker object. This one shares nothing with it but the interface.

boto3's own configuration applies (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, AWS_CA_BUNDLE, ~/.aws/config, ...)
but for the number of attempts, which is ours: botocore's come to the same and would multiply with them.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from functools import partial
from typing import IO, Any

from botocore import exceptions
from iopath.common.file_io import PathHandler

from papilio.trainer.storage.retries import DEFAULT_RETRIES, RetryPolicy, StorageError, TryAgainError
from papilio.trainer.storage.s3_client import PREFIX, client, error_code, object_size, request, split
from papilio.trainer.storage.s3_files import S3Reader, S3Writer, TextWriter

logger = logging.getLogger(__name__)

READ_AHEAD_BYTES = 8 << 20
_IS_THERE = ("PreconditionFailed", "412")
# Services that know no conditions say so, or (not seen) take no notice of them.
_UNCONDITIONAL = ("NotImplemented", "501")


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
