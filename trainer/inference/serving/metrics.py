"""What a server counts, in cells that all its processes share, and the text that Prometheus reads.

Each process writes its own row of cells, in two threads that write different ones; any process can add the rows up.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections import deque
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

FORMATS = ("json", "arrow", "other")
STATUSES = (200, 400, 404, 405, 408, 413, 415, 431, 500, 503)
SWAP_RESULTS = ("done", "refused")
# Bounds of the latency cells: 24 a decade from 0.1 ms to 10 s, so that a percentile is known to 5 % or better.
_CELLS_PER_DECADE, _FIRST_S, _NUM_DECADES = 24, 1e-4, 5
LATENCY_BOUNDS_S = _FIRST_S * 10 ** (np.arange(_CELLS_PER_DECADE * _NUM_DECADES + 1) / _CELLS_PER_DECADE)
_CELLS_PER_BUCKET = 6
BATCH_BOUNDS = 2 ** np.arange(14)
QUANTILES = (0.5, 0.9, 0.99, 0.999)
WINDOW_STEP_S = 10.0
_WINDOW_STEPS = 6
_CELLS = np.dtype(
    [
        ("requests", "f8", (len(FORMATS), len(STATUSES))),
        ("latency", "f8", (len(LATENCY_BOUNDS_S) + 1,)),
        ("latency_sum", "f8"),
        ("batches", "f8", (len(BATCH_BOUNDS) + 1,)),
        ("records", "f8"),
        ("scoring_s", "f8"),
        ("ids", "f8"),
        ("unknown_ids", "f8"),
        ("waiting_records", "f8"),
        ("in_flight", "f8"),
        ("swaps", "f8", (len(SWAP_RESULTS),)),
        ("is_ready", "f8"),
    ]
)
_COUNTERS = (
    ("records", "records_scored_total", "Records scored."),
    ("scoring_s", "scoring_seconds_total", "Time spent encoding and scoring batches."),
    ("ids", "ids_total", "Categorical ids of scored records."),
    ("unknown_ids", "unknown_ids_total", "Of these, ids that the training data did not have; they share row 0."),
)
_GAUGES = (
    ("waiting_records", "waiting_records", "Records waiting to be scored."),
    ("in_flight", "requests_in_flight", "Requests begun and not answered yet."),
    ("is_ready", "ready_processes", "Processes that serve."),
)


def make_shared_cells(num_processes: int) -> int:
    """Return the descriptor of an anonymous file for the cells of so many processes."""
    with tempfile.TemporaryFile() as file:
        file.truncate(num_processes * _CELLS.itemsize)
        return os.dup(file.fileno())


class Metrics:
    """The cells of one process; `record_*` are called by the event loop's thread, `add_batch` by the scoring one."""

    def __init__(self, descriptor: int | None = None, process: int = 0) -> None:
        """Without a descriptor (of `make_shared_cells`) the process is the only one."""
        if descriptor is None:
            self._cells: NDArray[np.void] = np.zeros(1, _CELLS)
        else:
            self._cells = np.frombuffer(mmap.mmap(descriptor, 0), _CELLS)
        self._own = self._cells[process : process + 1]
        self._requests: NDArray[np.float64] = self._own["requests"][0]
        self._latency: NDArray[np.float64] = self._own["latency"][0]
        self._latencies: deque[NDArray[np.float64]] = deque([self._total("latency")], maxlen=_WINDOW_STEPS)

    def clear_gauges(self) -> None:
        """Set this process's gauges to 0: they may be of a process that died, whose place it takes."""
        for gauge, _, _ in _GAUGES:
            self._own[gauge] = 0

    def is_ready(self, process: int) -> bool:
        """Whether a process is ready, or was when it died."""
        return bool(self._cells["is_ready"][process])

    def record_request(self, kind: str, status: int, seconds: float) -> None:
        """Count an answered request; `kind` is one of FORMATS, and only answers with scores count for latency."""
        self._requests[FORMATS.index(kind), STATUSES.index(status)] += 1
        if status == 200 and kind != "other":
            self._latency[np.searchsorted(LATENCY_BOUNDS_S, seconds)] += 1
            self._own["latency_sum"] += seconds

    def record_swap(self, result: str) -> None:
        """Count an attempt to take another package, one of SWAP_RESULTS."""
        self._own["swaps"][0, SWAP_RESULTS.index(result)] += 1

    def set_gauge(self, name: str, value: float) -> None:
        """Set one of waiting_records, in_flight and is_ready."""
        self._own[name] = value

    def add_batch(self, *, num_records: int, seconds: float, num_ids: int, num_unknown_ids: int) -> None:
        """Count a scored batch."""
        self._own["batches"][0, np.searchsorted(BATCH_BOUNDS, num_records)] += 1
        for name, amount in (
            ("records", num_records),
            ("scoring_s", seconds),
            ("ids", num_ids),
            ("unknown_ids", num_unknown_ids),
        ):
            self._own[name] += amount

    def step_window(self) -> None:
        """Move the window of the latency percentiles; to be called every WINDOW_STEP_S seconds."""
        self._latencies.append(self._total("latency"))

    def latency_percentiles(self) -> dict[float, float]:
        """Return seconds by quantile over the last minute, all processes together; none if nothing was answered."""
        return percentiles(self._total("latency") - self._latencies[0])

    def num_answered(self) -> int:
        """Requests that this process answered with scores."""
        return int(self._latency.sum())

    def text(self, package: Mapping[str, str]) -> str:
        """Return all figures in Prometheus's text format 0.0.4; `package` is the identity of what is served."""
        labels = ",".join(f'{name}="{_escape(value)}"' for name, value in package.items())
        lines = [*_head("package_info", "gauge", "What is served."), f"papilio_package_info{{{labels}}} 1"]
        lines += self._request_lines() + self._latency_lines() + self._batch_lines()
        for kind, group in (("counter", _COUNTERS), ("gauge", _GAUGES)):
            for cell, name, text in group:
                lines += [*_head(name, kind, text), f"papilio_{name} {_number(self._total(cell))}"]
        lines += _head("package_swaps_total", "counter", "Attempts to take another package.")
        lines += [
            f'papilio_package_swaps_total{{result="{result}"}} {_number(value)}'
            for result, value in zip(SWAP_RESULTS, self._total("swaps"), strict=True)
        ]
        return "\n".join(lines) + "\n"

    def _total(self, name: str) -> NDArray[np.float64]:
        return np.asarray(self._cells[name].sum(axis=0))

    def _request_lines(self) -> list[str]:
        lines = _head("requests_total", "counter", "Answered requests, by format and HTTP status.")
        counts = self._total("requests")
        for kind, row in zip(FORMATS, counts, strict=True):
            for status, value in zip(STATUSES, row, strict=True):
                if value or (status == 200 and kind != "other"):
                    lines.append(f'papilio_requests_total{{format="{kind}",status="{status}"}} {_number(value)}')
        return lines

    def _latency_lines(self) -> list[str]:
        name, text = "request_seconds", "From the head of a request to the end of its answer, of answers with scores."
        cumulative = self._total("latency").cumsum()
        places = range(0, len(LATENCY_BOUNDS_S), _CELLS_PER_BUCKET)
        lines = _head(name, "histogram", text)
        lines += [
            f'papilio_{name}_bucket{{le="{LATENCY_BOUNDS_S[place]:.4g}"}} {_number(cumulative[place])}'
            for place in places
        ]
        lines += [
            f'papilio_{name}_bucket{{le="+Inf"}} {_number(cumulative[-1])}',
            f"papilio_{name}_sum {self._total('latency_sum'):.9g}",
            f"papilio_{name}_count {_number(cumulative[-1])}",
        ]
        lines += _head("request_seconds_last_minute", "gauge", "Percentiles of the same over the last minute.")
        for quantile, seconds in self.latency_percentiles().items():
            lines.append(f'papilio_request_seconds_last_minute{{quantile="{quantile}"}} {seconds:.4g}')
        return lines

    def _batch_lines(self) -> list[str]:
        cumulative = self._total("batches").cumsum()
        lines = _head("batch_records", "histogram", "Records scored together.")
        lines += [
            f'papilio_batch_records_bucket{{le="{bound}"}} {_number(count)}'
            for bound, count in zip(BATCH_BOUNDS.tolist(), cumulative[:-1], strict=True)
        ]
        return [
            *lines,
            f'papilio_batch_records_bucket{{le="+Inf"}} {_number(cumulative[-1])}',
            f"papilio_batch_records_sum {_number(self._total('records'))}",
            f"papilio_batch_records_count {_number(cumulative[-1])}",
        ]


def percentiles(counts: NDArray[np.float64]) -> dict[float, float]:
    """Return seconds by quantile of counts [cells] of latencies, read off geometrically within a cell."""
    total = counts.sum()
    if total <= 0:
        return {}
    cumulative = counts.cumsum()
    found = {}
    for quantile in QUANTILES:
        cell = int(np.searchsorted(cumulative, quantile * total))
        upper = LATENCY_BOUNDS_S[min(cell, len(LATENCY_BOUNDS_S) - 1)]
        before = cumulative[cell - 1] if cell else 0.0
        share = (quantile * total - before) / counts[cell]
        found[quantile] = float(upper * 10 ** ((share - 1) / _CELLS_PER_DECADE))
    return found


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP papilio_{name} {text}", f"# TYPE papilio_{name} {kind}"]


def _number(value: object) -> str:
    return f"{float(value):.15g}"  # type: ignore[arg-type]


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
