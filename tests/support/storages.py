"""What tests of storages share: retries that do not wait, and Python in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from papilio.trainer.storage import api as storage
from papilio.trainer.storage.retries import DEFAULT_RETRIES, RetryPolicy

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 1 << 20
# More than one part of an upload, so that it is a multipart one.
LARGE = bytes(range(256)) * (17 * MIB // 256) + b"the end"


class Pauses:
    """Retries without waiting, which notes how long it would have waited."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.policy = RetryPolicy(sleep=self.seconds.append, random=lambda: 0.0)


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


def read_range(path: str, offset: int, length: int, *, retries: RetryPolicy = DEFAULT_RETRIES) -> bytes:
    buffer = bytearray(length)
    storage.read_into(memoryview(buffer), path, offset, retries=retries)
    return bytes(buffer)


def tear(chunk: bytes) -> Iterator[bytes]:
    yield chunk
    raise RuntimeError("the source broke")
