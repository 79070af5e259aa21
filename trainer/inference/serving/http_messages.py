"""HTTP requests to records or tables, and scores and refusals to HTTP answers, on the raw ASGI interface."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa

from papilio.data_pipeline.errors import PapilioError
from papilio.data_pipeline.schema import Schema
from papilio.trainer.inference.encoding.json_records import Record, RequestError, check_records
from papilio.trainer.inference.serving.micro_batcher import RecordError, Scores
from papilio.trainer.inference.serving.request_limits import RequestLimits, TooLargeError

Receive = Callable[[], Awaitable[dict[str, Any]]]
Headers = list[tuple[bytes, bytes]]
JSON_TYPE = "application/json"
ARROW_TYPE = "application/vnd.apache.arrow.stream"
TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_CONTENT_LENGTH = b"content-length"
_CONTENT_ENCODING = b"content-encoding"
# Of an error, in an answer and in the log: clients send what they like, and some of it is quoted.
_MAX_ERROR_CHARACTERS = 500
# Digits that tell any two float32 numbers apart.
_SCORE_FORMAT = "{:.9g}"


class HttpError(PapilioError):
    """An answer other than scores."""

    def __init__(self, status: int, message: str, headers: Sequence[tuple[str, str]] = (), **details: Any) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": one_line(message)} | {key: value for key, value in details.items() if value is not None}


class ClientGoneError(PapilioError):
    """The client closed the connection before its request was whole."""


@dataclass(frozen=True)
class Answer:
    """An answer to send."""

    status: int
    content_type: str
    body: bytes
    headers: Sequence[tuple[str, str]] = ()

    @staticmethod
    def json(status: int, value: Any, headers: Sequence[tuple[str, str]] = ()) -> Answer:
        """Make one of a value."""
        return Answer(status, JSON_TYPE, json.dumps(value, indent=1).encode() + b"\n", headers)

    @staticmethod
    def of_error(error: HttpError) -> Answer:
        """Make one that says what is wrong."""
        return Answer.json(error.status, error.body, error.headers)

    def start_message(self, more_headers: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Return the ASGI message that begins it."""
        headers = [("content-type", self.content_type), ("content-length", str(len(self.body)))]
        headers += [*self.headers, *more_headers]
        encoded = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers]
        return {"type": "http.response.start", "status": self.status, "headers": encoded}


def header(headers: Headers, name: bytes) -> str:
    """Return a header's value, "" if there is none."""
    return next((value for found, value in headers if found == name), b"").decode("latin-1")


async def read_body(headers: Headers, receive: Receive, *, max_bytes: int, timeout_s: float) -> bytes:
    """Read a request's body.

    Raises:
        HttpError: it is too large (413) or too slow (408).
        ClientGoneError: the client left.
    """
    coding = header(headers, _CONTENT_ENCODING).strip().lower()
    if coding not in {"", "identity"}:
        raise HttpError(415, f"the body is encoded as {coding!r}; send it without a content-encoding")
    length = header(headers, _CONTENT_LENGTH)
    if length.isdigit() and int(length) > max_bytes:
        _refuse_size(f"{int(length):,}", max_bytes)
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    message = await _next_message(receive, timeout_s)
    if not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        if len(body) > max_bytes:
            _refuse_size("more", max_bytes)
        return body
    parts = [message["body"]]
    num_bytes = len(parts[0])
    while message.get("more_body", False):
        message = await _next_message(receive, deadline_s - loop.time())
        parts.append(message.get("body", b""))
        num_bytes += len(parts[-1])
        if num_bytes > max_bytes:
            _refuse_size("more", max_bytes)
    return b"".join(parts)


async def _next_message(receive: Receive, timeout_s: float) -> dict[str, Any]:
    try:
        async with asyncio.timeout(timeout_s):
            message = await receive()
    except TimeoutError:
        raise HttpError(408, "the body did not arrive in time", [("connection", "close")]) from None
    if message["type"] == "http.disconnect":
        raise ClientGoneError
    return message


def _refuse_size(found: str, max_bytes: int) -> NoReturn:
    raise HttpError(
        413, f"the body has {found} bytes, at most {max_bytes:,} are allowed; send fewer records in a request"
    )


def _refuse_constant(word: str) -> NoReturn:
    raise RequestError(f"{word} is not JSON; send null where a value is missing")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def read_json(body: bytes, schema: Schema, limits: RequestLimits) -> list[Record]:
    """Read `{"records": [...]}`.

    Raises:
        RequestError: it is not JSON, or not of this form.
        TooLargeError: there are too many records, or ids in a bag.
    """
    try:
        payload = _DECODER.decode(body.decode())
    except UnicodeDecodeError:
        raise RequestError("the body is not UTF-8 text") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        if body.startswith(codecs.BOM_UTF8):
            raise RequestError("the body begins with a byte order mark; send JSON without one") from None
        raise RequestError(f"the body is not JSON: {error}") from None
    except ValueError as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError("the body holds a number that is too long: at most 4,300 digits are read") from None
    if isinstance(payload, dict) and isinstance(payload.get("records"), list):
        limits.check_records(len(payload["records"]))
    records = check_records(payload, schema)
    limits.check_json_bags(records, schema, len(body))
    return records


def json_scores(scores: Scores) -> bytes:
    """Write `{"probabilities": [...]}`."""
    return ('{"probabilities": [' + ", ".join(map(_SCORE_FORMAT.format, scores.tolist())) + "]}\n").encode()


def arrow_scores(scores: Scores) -> bytes:
    """Write a stream of one column, `probability`."""
    batch = pa.record_batch({"probability": pa.array(scores, pa.float32())})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def http_error_of(error: RequestError) -> HttpError:
    """Say what is wrong with a request as HTTP does."""
    if isinstance(error, RecordError):
        return HttpError(400, str(error), record=error.record, column=error.column)
    return HttpError(413 if isinstance(error, TooLargeError) else 400, str(error))


def one_line(text: str, max_characters: int = _MAX_ERROR_CHARACTERS) -> str:
    """Return text as one printable line of bounded length."""
    # Cut first, for what follows looks at each character.
    cut = " ".join(text[: 4 * max_characters].split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
    return line if len(line) <= max_characters else line[: max_characters - 3] + "..."
