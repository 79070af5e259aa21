"""An S3 service on loopback, by moto, behind a layer that misbehaves when told to."""

from __future__ import annotations

import io
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import boto3
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server

Application = Callable[..., Iterable[bytes]]


@dataclass(frozen=True)
class Request:
    """One request as it came in."""

    method: str
    path: str
    query: dict[str, str]
    range: str


@dataclass
class _Fault:
    num_left: int
    method: str
    matching: str
    misbehave: Callable[[Application, dict[str, Any], Any], Iterable[bytes]]
    num_spared: int = 0


@dataclass
class Faults:
    """What goes wrong next. Each fault hits the next `count` requests of a method whose URL holds `matching`.

    `requests` has all that came in since the last clear().
    """

    requests: list[Request] = field(default_factory=list)
    _faults: list[_Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def clear(self) -> None:
        """Behave again, and forget the requests."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()

    def count(self, method: str, matching: str = "") -> int:
        """Requests of a method whose path holds `matching`."""
        return sum(request.method == method and matching in request.path for request in list(self.requests))

    def fail(
        self, count: int, method: str, status: int = 503, code: str = "SlowDown", matching: str = "", after: int = 0
    ) -> None:
        """Answer with an error; the first `after` requests are spared."""

        def misbehave(application: Application, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = f"<Error><Code>{code}</Code><Message>told to fail</Message></Error>".encode()
            reason = f"{status} told to fail"
            start(reason, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [b"" if method == "HEAD" else body]

        self._add(_Fault(count, method, matching, misbehave, after))

    def hang_up(self, count: int, method: str, matching: str = "") -> None:
        """Close the connection in the middle of the body: of the answer of a GET, of the request of a PUT."""

        def misbehave(application: Application, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
            if method in ("PUT", "POST"):
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
                _close(environ)
                return []
            body = b"".join(application(environ, start))
            return _half_then_close(body, environ)

        self._add(_Fault(count, method, matching, misbehave))

    def lose_answer(self, count: int, method: str, matching: str = "") -> None:
        """Do what is asked, then close the connection instead of saying so."""

        def misbehave(application: Application, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
            b"".join(application(environ, lambda status, headers, error=None: None))
            _close(environ)
            return []

        self._add(_Fault(count, method, matching, misbehave))

    def be_slow(self, count: int, method: str, seconds: float, matching: str = "") -> None:
        """Answer late."""

        def misbehave(application: Application, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
            time.sleep(seconds)
            return application(environ, start)

        self._add(_Fault(count, method, matching, misbehave))

    def truncate(self, count: int, method: str = "PUT", matching: str = "") -> None:
        """Accept an upload, keep the first half of it, and answer that all is well."""

        def misbehave(application: Application, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
            assert "aws-chunked" not in environ.get("HTTP_CONTENT_ENCODING", ""), "half of it would not parse"
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            half = body[: len(body) // 2]
            kept = {name: value for name, value in environ.items() if "CHECKSUM" not in name and "MD5" not in name}
            kept |= {"wsgi.input": io.BytesIO(half), "CONTENT_LENGTH": str(len(half))}
            return application(kept, start)

        self._add(_Fault(count, method, matching, misbehave))

    def _add(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def take(self, request: Request, url: str) -> _Fault | None:
        """Note a request; return the fault that hits it, if any."""
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                if fault.num_left > 0 and fault.method == request.method and fault.matching in url:
                    if fault.num_spared > 0:
                        fault.num_spared -= 1
                        continue
                    fault.num_left -= 1
                    return fault
        return None


class S3StandIn:
    """The service. `environment` is what boto3 needs to find it; `client` a plain boto3 client, for oracles."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.faults = Faults()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=MotoRequestHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "loopback",
            "AWS_SECRET_ACCESS_KEY": "loopback",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        session = boto3.session.Session(aws_access_key_id="loopback", aws_secret_access_key="loopback")
        self.client: Any = session.client("s3", "us-east-1", endpoint_url=self.environment["AWS_ENDPOINT_URL"])
        self._num_buckets = 0
        self.bucket = ""

    def url(self, path: str = "") -> str:
        """An s3:// path in the bucket of the test at hand."""
        return f"s3://{self.bucket}/{path}"

    def new_bucket(self) -> None:
        """Begin a test: an empty bucket, no faults."""
        self._num_buckets += 1
        self.bucket = f"bucket-{self._num_buckets}"
        self.client.create_bucket(Bucket=self.bucket)
        self.faults.clear()

    def fill(self, keys: Iterable[str]) -> None:
        """Put empty objects there, faster than by requests."""
        for key in keys:
            s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(self.bucket, key, b"")

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        query = environ.get("QUERY_STRING", "")
        request = Request(
            environ["REQUEST_METHOD"],
            environ["PATH_INFO"],
            dict(parse_qsl(query, keep_blank_values=True)),
            environ.get("HTTP_RANGE", ""),
        )
        fault = self.faults.take(request, f"{request.path}?{query}")
        if fault is None:
            return self._moto(environ, start)
        return fault.misbehave(self._moto, environ, start)


def _close(environ: dict[str, Any]) -> None:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError("told to hang up")


def _half_then_close(body: bytes, environ: dict[str, Any]) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    _close(environ)
