"""Requests that come one by one, scored together: a bounded queue and one thread that empties it.

The thread takes what waits as soon as it is free, so batches grow with the load and a lone request waits for nobody.
Encoding is part of its work, for records encoded together cost a fraction of the same ones encoded singly.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from papilio.trainer.inference.encoding.json_records import Record, RequestError
from papilio.trainer.inference.encoding.request_encoder import EncodedBatch, merge_batches
from papilio.trainer.inference.scorer import Scorer
from papilio.trainer.inference.serving.metrics import Metrics
from papilio.trainer.inference.serving.request_limits import RequestLimits
from papilio.trainer.inference.serving.serve_options import ServeOptions

logger = logging.getLogger(__name__)
_NEWEST_SHARE = 0.1
# For what is being scored; the thread is a daemon, so that a model that hangs does not keep the process.
_JOIN_TIMEOUT_S = 10.0
Scores = NDArray[np.float32]
# JSON objects, or an Arrow table.
Content: TypeAlias = list[Record] | pa.Table


class OverloadError(RuntimeError):
    """More waits than may; the client should come back later."""


class RecordError(RequestError):
    """A malformed record of a request, its place in it and the column that is wrong, if it is one."""

    def __init__(self, record: int, column: str | None, reason: str) -> None:
        place = f"record {record}" if column is None else f"record {record}, column {column}"
        super().__init__(f"{place}: {reason}")
        self.record, self.column = record, column


@dataclass(eq=False)
class _Waiting:
    """A request in the queue, and the package that was served when it came."""

    scorer: Scorer
    content: Content
    num_records: int
    num_bytes: int
    answer: asyncio.Future[Scores]
    begin_s: float


_Outcomes = list[tuple[_Waiting, Scores | Exception]]


class MicroBatcher:
    """Scores requests of the event loop that it was made in; all methods are for that loop's thread."""

    def __init__(self, scorer: Scorer, options: ServeOptions, metrics: Metrics) -> None:
        self.scorer = scorer
        self._options, self._metrics = options, metrics
        self._limits = RequestLimits.of(options)
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Waiting] = deque()
        self._num_waiting = 0
        self._num_waiting_bytes = 0
        self._busy_since_s: float | None = None  # None while nothing is scored
        self._in_hand: list[_Waiting] = []
        self._record_s = 0.0  # that a record takes, lately
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="scoring", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are still being scored."""
        return self._thread.is_alive()

    @property
    def is_stalled(self) -> bool:
        """Whether the scoring thread is at one batch for longer than is allowed."""
        begin_s = self._busy_since_s
        return begin_s is not None and time.monotonic() - begin_s > self._options.stall_timeout_s

    def refuse_if_stalled(self) -> bool:
        """Refuse what waits if nothing is scored any more; to be called now and then. Return whether that is so."""
        if not self.is_stalled:
            return False
        with self._changed:
            waiting = list(self._queue)
            self._queue.clear()
            for each in waiting:
                self._count(-each.num_records, -each.num_bytes)
        _deliver([(each, OverloadError(self._stall_text())) for each in [*self._in_hand, *waiting]])
        return True

    def submit(self, content: Content, num_records: int, num_bytes: int = 0) -> asyncio.Future[Scores]:
        """Queue records, which take so many bytes in memory; the future gives their probabilities.

        Raises:
            OverloadError: the queue is full; from the future: the request waited too long.
            RecordError, RequestError: from the future: a record is malformed.
        """
        self.require_room(num_records, num_bytes)
        with self._changed:
            answer, begin_s = self._loop.create_future(), time.monotonic()
            waiting = _Waiting(self.scorer, content, num_records, num_bytes, answer, begin_s)
            self._queue.append(waiting)
            self._count(num_records, num_bytes)
            # The thread that waits for a batch to fill needs no waking for each request.
            if len(self._queue) == 1 or self._num_waiting >= self._options.max_batch:
                self._changed.notify()
        return waiting.answer

    def require_room(self, num_records: int = 1, num_bytes: int = 0) -> None:
        """Make sure that records may be queued; asked before a body is parsed, it keeps refusals cheap.

        Raises:
            OverloadError: the queue is full, or so long that they would wait for more than is allowed, or nothing is
                scored any more.
        """
        options = self._options
        if self.is_stalled:
            raise OverloadError(self._stall_text())
        if self._num_waiting_bytes + num_bytes > self._limits.max_waiting_bytes:
            raise OverloadError(f"requests of {self._num_waiting_bytes:,} bytes wait already; try again later")
        if self._num_waiting + num_records > options.max_queue:
            raise OverloadError(f"{self._num_waiting} records wait already, {options.max_queue} may; try again later")
        expected_ms = self._num_waiting * self._record_s * 1e3
        if expected_ms > options.max_delay_ms:
            raise OverloadError(f"{expected_ms:.0f} ms of work wait already; try again later")

    def close(self) -> None:
        """Score what waits, and end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(_JOIN_TIMEOUT_S)

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            begin_s = time.monotonic()
            outcomes = self._score_or_split(batch)
            self._busy_since_s, self._in_hand = None, []
            num_records = sum(waiting.num_records for waiting in batch)
            if num_records:
                self._record_s += _NEWEST_SHARE * ((time.monotonic() - begin_s) / num_records - self._record_s)
            self._loop.call_soon_threadsafe(_deliver, outcomes)

    def _next_batch(self) -> list[_Waiting] | None:
        """Wait for requests; None when closed and empty."""
        options = self._options
        with self._changed:
            while not self._queue:
                if self._is_closed:
                    return None
                self._changed.wait()
            full_s = self._queue[0].begin_s + options.max_wait_ms / 1e3
            while self._num_waiting < options.max_batch and not self._is_closed:
                remaining_s = full_s - time.monotonic()
                if remaining_s <= 0:
                    break
                self._changed.wait(remaining_s)
            return self._take()

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        late: _Outcomes = []
        oldest_s = time.monotonic() - self._options.max_delay_ms / 1e3
        num_records = num_bytes = 0
        while self._queue:
            first = self._queue[0]
            is_late = first.begin_s < oldest_s
            is_too_much = (
                num_records + first.num_records > self._options.max_batch
                or num_bytes + first.num_bytes > self._limits.max_bytes
            )
            if batch and not is_late and (is_too_much or first.scorer is not batch[0].scorer):
                break
            self._queue.popleft()
            self._count(-first.num_records, -first.num_bytes)
            if is_late:
                late.append((first, OverloadError(f"waited {self._options.max_delay_ms:g} ms; try again later")))
                continue
            batch.append(first)
            num_records += first.num_records
            num_bytes += first.num_bytes
        if late:
            self._loop.call_soon_threadsafe(_deliver, late)
        return batch

    def _count(self, num_records: int, num_bytes: int) -> None:
        self._num_waiting += num_records
        self._num_waiting_bytes += num_bytes
        self._metrics.set_gauge("waiting_records", self._num_waiting)

    def _stall_text(self) -> str:
        return f"one batch is being scored for more than {self._options.stall_timeout_s:g} s; ask another server"

    def _score_or_split(self, batch: list[_Waiting]) -> _Outcomes:
        """Score a batch; if that fails in a way we did not foresee, score its requests singly: one is the cause."""
        self._in_hand, self._busy_since_s = batch, time.monotonic()
        try:
            return _score(batch, self._metrics)
        except Exception as error:
            if len(batch) == 1:
                logger.exception("a request of %d records could not be scored", batch[0].num_records)
                return [(batch[0], error)]
            return [outcome for waiting in batch for outcome in self._score_or_split([waiting])]


def _deliver(outcomes: _Outcomes) -> None:
    for waiting, outcome in outcomes:
        if waiting.answer.done():  # its client has gone
            continue
        if isinstance(outcome, Exception):
            waiting.answer.set_exception(outcome)
        else:
            waiting.answer.set_result(outcome)


def _score(batch: list[_Waiting], metrics: Metrics) -> _Outcomes:
    begin_s = time.perf_counter()
    refused, encoded, order = _encode(batch)
    if not order:
        return refused
    merged = merge_batches(encoded)
    scores = batch[0].scorer.score(merged)
    metrics.add_batch(
        num_records=merged.num_rows,
        seconds=time.perf_counter() - begin_s,
        num_ids=len(merged.ids),
        num_unknown_ids=merged.num_unknown_ids,
    )
    return refused + _hand_out(order, scores, merged.faults)


def _encode(batch: list[_Waiting]) -> tuple[_Outcomes, list[EncodedBatch], list[_Waiting]]:
    """Return requests that cannot be encoded, the batches of the others, and these in the order of the batches.

    The records of all JSON requests are encoded together, and so are tables of the same columns.
    """
    refused: _Outcomes = []
    encoded: list[EncodedBatch] = []
    encoder = batch[0].scorer.encoder
    order = [waiting for waiting in batch if isinstance(waiting.content, list)]
    if order:
        encoded.append(encoder.encode_records([record for waiting in order for record in waiting.content]))
    for group in _groups_of_tables(batch):
        try:
            encoded.append(_encode_tables(group))
            order += group
        except RequestError as error:  # columns are lacking or of another type, in all tables of a group alike
            refused += [(waiting, error) for waiting in group]
    return refused, encoded, order


def _encode_tables(group: Sequence[_Waiting]) -> EncodedBatch:
    encoder = group[0].scorer.encoder
    try:
        return encoder.encode_table(pa.concat_tables([waiting.content for waiting in group]))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        if len(group) > 1:
            raise  # to be split: another table may be the cause
        # What Arrow cannot convert is the client's doing, whichever of its many types it is.
        table: Any = group[0].content
        for field in table.schema:
            if field.name in encoder.schema.dense_names and pa.types.is_nested(field.type):
                raise RequestError(f"column {field.name} is of type {field.type}, must hold numbers") from None
        raise RequestError(f"a column has values that no column of the model can have: {error}") from None


def _groups_of_tables(batch: Sequence[_Waiting]) -> list[list[_Waiting]]:
    """Return the requests with tables, those of the same columns and types together."""
    groups: list[list[_Waiting]] = []
    for waiting in batch:
        table = waiting.content
        if isinstance(table, list):
            continue
        group = next((group for group in groups if _have_same_columns(group[0].content, table)), None)
        if group is None:
            groups.append([waiting])
        else:
            group.append(waiting)
    return groups


def _have_same_columns(first: pa.Table, second: pa.Table) -> bool:
    return bool(first.schema.equals(second.schema))


def _hand_out(order: Sequence[_Waiting], scores: Scores, faults: dict[int, tuple[str, str]]) -> _Outcomes:
    outcomes: _Outcomes = []
    is_finite = np.isfinite(scores)
    start = 0
    for waiting in order:
        stop = start + waiting.num_records
        bad = next((row for row in range(start, stop) if row in faults), None) if faults else None
        outcome: Scores | Exception = scores[start:stop]
        if bad is not None:
            outcome = RecordError(bad - start, *faults[bad])
        elif not is_finite[start:stop].all():
            row = int(np.argmin(is_finite[start:stop]))
            outcome = RecordError(row, None, "its score is not a finite number; its dense values are too large")
        outcomes.append((waiting, outcome))
        start = stop
    return outcomes
