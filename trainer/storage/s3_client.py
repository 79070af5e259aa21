"""Requests to S3: one client a process, tried again by our own rules, with errors that name the fix.

boto3's own configuration applies (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, AWS_CA_BUNDLE, ~/.aws/config, ...)
but for the number of attempts, which is ours: botocore's come to the same and would multiply with them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import boto3
from botocore import exceptions
from botocore.config import Config
from urllib3.exceptions import HTTPError

from papilio.trainer.storage.retries import (
    DEFAULT_RETRIES,
    RetryPolicy,
    StorageError,
    StorageFailure,
    attempt,
)

Result = TypeVar("Result")
PREFIX = "s3://"
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 30  # without a byte coming in
NUM_CONNECTIONS = 32

_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_ENDPOINT = "check the network and AWS_ENDPOINT_URL"
_FORBIDDEN = "check the credentials, and the bucket's policy for s3:GetObject, PutObject, DeleteObject and ListBucket"
_FIXES = {
    "403": _FORBIDDEN,
    "AccessDenied": _FORBIDDEN,
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "ExpiredToken": f"the credentials have run out; {_CREDENTIALS}",
    "RequestTimeTooSkewed": "set this machine's clock",
    "404": "check the path",
    "NoSuchKey": "check the path",
    "NoSuchBucket": "create the bucket, or correct its name",
    "301": "set AWS_REGION to the bucket's region",
    "PermanentRedirect": "set AWS_REGION to the bucket's region",
}
_MISSING = ("404", "NoSuchKey")
_TRANSIENT_CODES = {
    "BadDigest",
    "InternalError",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentChecksumMismatch",
}
_TRANSIENT_STATUS = (408, 429)
_TRANSIENT_ERRORS = (
    exceptions.ConnectionError,
    exceptions.HTTPClientError,
    exceptions.IncompleteReadError,
    exceptions.FlexibleChecksumError,
    exceptions.ResponseStreamingError,
    HTTPError,  # botocore lets a few through while a body is read
)


def explain_s3_error(error: Exception) -> StorageFailure | None:
    """Say what an exception of boto3 means, a ValueError of its configuration included; None for another."""
    if isinstance(error, exceptions.ClientError):
        code, status = error_code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        is_transient = status >= 500 or status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES
        number = errno.ENOENT if code in _MISSING else errno.EACCES if status == 403 else None
        fix = _FIXES.get(code) or (_FORBIDDEN if status == 403 else "check the bucket and its service")
        return StorageFailure(str(error), fix, is_transient, number)
    if isinstance(error, _TRANSIENT_ERRORS):
        return StorageFailure(str(error), _ENDPOINT, True, errno.ETIMEDOUT)
    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return StorageFailure(str(error), _CREDENTIALS, False, errno.EACCES)
    if isinstance(error, exceptions.ParamValidationError):
        return StorageFailure(str(error), "correct the bucket's name", False)
    if isinstance(error, exceptions.BotoCoreError | ValueError):
        return StorageFailure(
            str(error),
            "check the AWS configuration (AWS_ENDPOINT_URL and others in the environment, ~/.aws/config)",
            False,
        )
    return None


def split(path: str) -> tuple[str, str]:
    """Bucket and key of an s3:// path; the key is empty for a bucket.

    Raises:
        StorageError: the path names no bucket.
    """
    bucket, _, key = path.removeprefix(PREFIX).partition("/")
    if not bucket:
        raise StorageError(f"{path} names no bucket; write s3://bucket/folder")
    return bucket, key


def object_size(path: str, retries: RetryPolicy = DEFAULT_RETRIES) -> int | None:
    """Bytes of an object; None if there is none.

    Raises:
        StorageError: the storage does not tell.
    """
    bucket, key = split(path)

    def ask() -> int | None:
        try:
            return int(client().head_object(Bucket=bucket, Key=key)["ContentLength"])
        except exceptions.ClientError as error:
            if error_code(error) in _MISSING:
                return None
            raise

    return request("look at", path, ask, retries)


@lru_cache(maxsize=1)
def _client_of_process(process: int) -> Any:
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"total_max_attempts": 1},
        max_pool_connections=NUM_CONNECTIONS,
        tcp_keepalive=True,
    )
    return boto3.session.Session().client("s3", config=config)


def client() -> Any:
    """Return boto3's client, one per process, as connections do not survive a fork."""
    return _client_of_process(os.getpid())


def request(operation: str, path: str, ask: Callable[[], Result], retries: RetryPolicy) -> Result:
    """Ask S3 for something, again and again while that fails for transient reasons.

    Raises:
        StorageError: it failed for good.
    """
    return attempt(operation, path, ask, retries, explain_s3_error)


def error_code(error: exceptions.ClientError) -> str:
    """S3's name of an error, or the HTTP status where the answer had no body."""
    return str(error.response.get("Error", {}).get("Code", ""))
