"""The HTTP interface: an ASGI application without a framework.

POST /predict   records in, probabilities out: JSON, or an Arrow IPC stream
GET  /          what is served, its limits, and an example request
GET  /healthz   whether this process works        GET /readyz   whether it should be sent requests
GET  /metrics   figures for Prometheus
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from papilio.trainer.inference.encoding.json_records import RequestError
from papilio.trainer.inference.package.format import SAMPLE
from papilio.trainer.inference.scorer import Scorer
from papilio.trainer.inference.serving.arrow_bodies import read_arrow
from papilio.trainer.inference.serving.http_messages import (
    ARROW_TYPE,
    JSON_TYPE,
    TEXT_TYPE,
    Answer,
    ClientGoneError,
    HttpError,
    Receive,
    arrow_scores,
    header,
    http_error_of,
    json_scores,
    read_body,
    read_json,
)
from papilio.trainer.inference.serving.metrics import Metrics
from papilio.trainer.inference.serving.micro_batcher import Content, MicroBatcher, OverloadError
from papilio.trainer.inference.serving.request_limits import MAX_EXPANSION, RequestLimits
from papilio.trainer.inference.serving.serve_options import ServeOptions

logger = logging.getLogger(__name__)
Send = Callable[[dict[str, Any]], Awaitable[None]]
RETRY_AFTER_S = 1
_FORMATS = {JSON_TYPE: "json", "": "json", ARROW_TYPE: "arrow"}


class ServingApp:
    """Answers requests by way of a batcher; `is_draining` is set when the server is about to stop."""

    def __init__(self, batcher: MicroBatcher, options: ServeOptions, metrics: Metrics) -> None:
        self.is_draining = False
        self._batcher, self._options, self._metrics = batcher, options, metrics
        self._limits = RequestLimits.of(options)
        self._num_in_flight = 0
        self._pages = {
            "/": self._about,
            "/healthz": self._health,
            "/readyz": self._readiness,
            "/metrics": self._figures,
        }

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        begin_s = time.perf_counter()
        if scope["path"] != "/predict":
            answer = self._page(scope)
            await self._send(answer, scope, send)
            self._metrics.record_request("other", answer.status, 0)
            return
        kind = _FORMATS.get(header(scope["headers"], b"content-type").partition(";")[0].strip().lower(), "other")
        self._count(1)
        try:
            with suppress(ClientGoneError):  # then nobody is there to be answered
                answer = await self._scores(scope, receive, kind)
                # Before it is sent: who has an answer finds it counted, whichever process is asked.
                self._metrics.record_request(kind, answer.status, time.perf_counter() - begin_s)
                await self._send(answer, scope, send)
        finally:
            self._count(-1)

    async def _scores(self, scope: dict[str, Any], receive: Receive, kind: str) -> Answer:
        try:
            if scope["method"] != "POST":
                raise HttpError(405, "send records with POST; GET / shows an example", [("allow", "POST")])
            if kind == "other":
                raise HttpError(415, f"set the header content-type to {JSON_TYPE} or {ARROW_TYPE}")
            if self._num_in_flight > self._options.max_requests:
                raise OverloadError(f"{self._options.max_requests} requests are under way already; try again later")
            body = await read_body(
                scope["headers"],
                receive,
                max_bytes=self._options.max_body_bytes,
                timeout_s=self._options.body_timeout_s,
            )
            self._batcher.require_room()
            scorer = self._batcher.scorer
            content, num_bytes = self._content(body, kind, scorer)
            scores = await self._batcher.submit(content, len(content), num_bytes)
        except RequestError as error:
            return Answer.of_error(http_error_of(error))
        except HttpError as error:
            return Answer.of_error(error)
        except OverloadError as error:
            return Answer.of_error(HttpError(503, str(error), [("retry-after", str(RETRY_AFTER_S))]))
        except (ClientGoneError, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("a request was not answered")
            return Answer.of_error(HttpError(500, "the server failed; its log says how"))
        headers = [("x-papilio-package", scorer.label)]
        if kind == "json":
            return Answer(200, JSON_TYPE, json_scores(scores), headers)
        return Answer(200, ARROW_TYPE, arrow_scores(scores), headers)

    def _content(self, body: bytes, kind: str, scorer: Scorer) -> tuple[Content, int]:
        """Return what a body says, and the bytes that it takes in memory at most."""
        encoder = scorer.encoder
        if kind == "arrow":
            return read_arrow(body, self._limits, encoder.separators)
        return read_json(body, encoder.schema, self._limits), MAX_EXPANSION * len(body)

    async def _send(self, answer: Answer, scope: dict[str, Any], send: Send) -> None:
        # A client that is told so closes the connection itself, and meets no closed one with its next request.
        # So does one that asked whether to send its body and was answered without it.
        is_unsent = answer.status != 200 and header(scope["headers"], b"expect") != ""
        closing = [("connection", "close")] if self.is_draining or is_unsent else []
        await send(answer.start_message(closing))
        body = b"" if scope["method"] == "HEAD" else answer.body
        await send({"type": "http.response.body", "body": body})

    def _page(self, scope: dict[str, Any]) -> Answer:
        page = self._pages.get(scope["path"])
        if page is None:
            return Answer.of_error(
                HttpError(404, f"no such path; there are POST /predict, GET {', '.join(self._pages)}")
            )
        if scope["method"] not in {"GET", "HEAD"}:
            return Answer.of_error(HttpError(405, "only GET is allowed here", [("allow", "GET, HEAD")]))
        return page()

    def _about(self) -> Answer:
        scorer = self._batcher.scorer
        manifest = scorer.package.manifest
        sample = scorer.package.read_json(SAMPLE)
        options = self._options
        return Answer.json(
            200,
            {
                "package": _identity(scorer),
                "precisions": {table.name: table.precision for table in manifest.tables},
                "certified": manifest.certified,
                "columns": {"dense": list(manifest.dense_features), "categorical": manifest.features},
                "limits": {
                    "body_bytes": options.max_body_bytes,
                    "unpacked_bytes": self._limits.max_bytes,
                    "records": self._limits.max_records,
                    "ids_of_a_bag": self._limits.max_bag_ids,
                },
                "formats": [JSON_TYPE, ARROW_TYPE],
                "example": {
                    "POST /predict": {"records": sample["request"]["records"][:1]},
                    "answer": {"probabilities": sample["probabilities"][:1]},
                },
            },
        )

    def _health(self) -> Answer:
        problem = self._problem()
        return Answer.json(503 if problem else 200, {"status": problem or "ok"})

    def _problem(self) -> str | None:
        if not self._batcher.is_alive:
            return "the scoring thread has ended; restart this process"
        if self._batcher.is_stalled:
            limit_s = self._options.stall_timeout_s
            return f"one batch is being scored for more than {limit_s:g} s (--stall-timeout-s); restart this process"
        return None

    def _readiness(self) -> Answer:
        if self.is_draining:
            return Answer.json(503, {"status": "stopping"})
        if (problem := self._problem()) is not None:
            return Answer.json(503, {"status": problem})
        return Answer.json(200, {"status": "ready", "package": self._batcher.scorer.label})

    def _figures(self) -> Answer:
        return Answer(200, TEXT_TYPE, self._metrics.text(_identity(self._batcher.scorer)).encode())

    def _count(self, change: int) -> None:
        self._num_in_flight += change
        self._metrics.set_gauge("in_flight", self._num_in_flight)


def _identity(scorer: Scorer) -> dict[str, str]:
    manifest = scorer.package.manifest
    return {
        "name": manifest.name,
        "run": manifest.source.run,
        "checkpoint": manifest.source.checkpoint,
        "made_at": manifest.made_at,
        "papilio_version": manifest.papilio_version,
    }
