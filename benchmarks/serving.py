"""Requests per second and latency of `papilio serve`: 1 and 64 records a request, JSON and Arrow, by connections.

python -m benchmarks.serving [--package DIR] [--seconds 4] [--workers 1]

Closed loop over loopback: each connection sends its next request when it has the answer to the last. The clients run in
this process, the server in its own, and both want a core. "CPU" is what the server's processes used, per answer with
scores; latencies are of these.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import uvloop

from benchmarks.random_package import make_package
from papilio.data_pipeline.schema import criteo_schema
from papilio.trainer.config import ModelConfig

JSON_TYPE = "application/json"
ARROW_TYPE = "application/vnd.apache.arrow.stream"
NUM_BODIES = 64
ROWS_PER_TABLE = 100_000
WARM_UP_SHARE = 0.25
CONNECT_S = 0.5
# By records a request. The most of the last is more than the server's queue takes: the rest is refused, and the client
# asks again at once.
CONNECTIONS = {1: (1, 8, 32), 64: (1, 8, 32, 256)}
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
Records = list[dict[str, Any]]


@dataclass
class Run:
    """What a round of requests gave: seconds of each answer, how many were refused, and the server's CPU seconds."""

    seconds: list[float]
    num_refused: int
    wall_s: float
    cpu_s: float


class Client(asyncio.Protocol):
    """A connection that sends requests one after the other; only the status and the length of answers are read."""

    def __init__(self, requests: list[bytes], first: int, warm_s: float, end_s: float) -> None:
        self._requests, self._next = requests, first
        self._warm_s, self._end_s = warm_s, end_s
        self._buffer = b""
        self.seconds: list[float] = []
        self.num_refused = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for `begin`."""
        self._transport: Any = transport

    def begin(self) -> None:
        """Send the first request."""
        self._send()

    def data_received(self, data: bytes) -> None:
        """Note an answer once it is whole, and send the next request."""
        self._buffer += data
        head_end = self._buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return
        place = self._buffer.find(b"content-length: ", 0, head_end) + 16
        length = int(self._buffer[place : self._buffer.find(b"\r", place)])
        if len(self._buffer) < head_end + 4 + length:
            return
        now_s = time.perf_counter()
        if self._buffer.startswith(b"HTTP/1.1 200"):
            if now_s > self._warm_s:
                self.seconds.append(now_s - self._begin_s)
        else:
            self.num_refused += 1
        self._buffer = b""
        if now_s > self._end_s:
            self._transport.close()
            self.done.set_result(None)
        else:
            self._send()

    def connection_lost(self, error: Exception | None) -> None:
        """Fail if there was more to send."""
        if not self.done.done():
            self.done.set_exception(error or RuntimeError("the server closed the connection"))

    def _send(self) -> None:
        self._next += 1
        self._begin_s = time.perf_counter()
        self._transport.write(self._requests[self._next % len(self._requests)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", help="default: a random one, 26 tables of 100,000 rows x 16, Criteo's columns")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement, a quarter of it warm-up")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--max-wait-ms", type=float, default=0.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        package = options.package or make_criteo_package(f"{folder}/package")
        records = read_sample(package)
        settings = {"package": package, "port": 0, "workers": options.workers, "max_wait_ms": options.max_wait_ms}
        with Server(settings, Path(folder) / "log") as server:
            print("| format | records | connections | requests/s | records/s | p50 ms | p99 ms | refused | CPU us |")
            print("|---|---|---|---|---|---|---|---|---|")
            for kind in (JSON_TYPE, ARROW_TYPE):
                for count, all_connections in CONNECTIONS.items():
                    requests = [as_request(kind, vary(records, i * count, count)) for i in range(NUM_BODIES)]
                    for connections in all_connections:
                        run = uvloop.run(drive(server, requests, connections, options.seconds))
                        print(row_of(kind, count, connections, run), flush=True)


def make_criteo_package(folder: str) -> str:
    """Write a package of Criteo's columns."""
    schema = criteo_schema(num_buckets=ROWS_PER_TABLE)
    sample = [{name: 3 if name[0] == "I" else "ab12" for name in [*schema.dense_names, *schema.categorical_names]}]
    make_package(folder, schema, ModelConfig(embedding_dim=16), sample)
    return folder


def read_sample(package: str) -> Records:
    """Return the package's own sample records."""
    records: Records = json.loads((Path(package) / "sample.json").read_text())["request"]["records"]
    return records


def vary(records: Records, first: int, count: int) -> Records:
    """Return records like those of the sample that all differ."""
    varied = []
    for i in range(first, first + count):
        record = dict(records[i % len(records)])
        for k, (name, value) in enumerate(record.items()):
            if isinstance(value, str):
                record[name] = f"{(i * 2654435761 + k * 40503) % 2**32:08x}"
        varied.append(record)
    return varied


def as_request(kind: str, records: Records) -> bytes:
    """Return the bytes of an HTTP request."""
    if kind == JSON_TYPE:
        body = json.dumps({"records": records}).encode()
    else:
        table = pa.Table.from_pylist(records)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        body = sink.getvalue().to_pybytes()
    head = f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Server:
    """`papilio serve` in a process of its own (a context manager)."""

    def __init__(self, settings: dict[str, Any], log: Path) -> None:
        self._settings, self._log = settings, log

    def __enter__(self) -> Server:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with self._log.open("wb") as file:
            command = [sys.executable, "-m", "papilio.trainer.inference.serving.main", json.dumps(self._settings)]
            self._process = subprocess.Popen(command, stderr=file, env=environment)
        while self._log.read_text().count("is served on") < self._settings["workers"]:
            if self._process.poll() is not None:
                raise RuntimeError(self._log.read_text())
            time.sleep(0.05)
        self.port = int(self._log.read_text().split(" is served on http://127.0.0.1:")[1].split()[0])
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)

    def cpu_s(self) -> float:
        """CPU seconds of the server's processes so far."""
        pids = [self._process.pid]
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        total = 0.0
        for pid in [*pids, *map(int, children)]:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
        return total


async def drive(server: Server, requests: list[bytes], num_connections: int, seconds: float) -> Run:
    """Send requests on so many connections for so long."""
    begin_s = time.perf_counter() + CONNECT_S
    warm_s, end_s = begin_s + seconds * WARM_UP_SHARE, begin_s + seconds
    loop = asyncio.get_running_loop()
    clients = [Client(requests, i * 7, warm_s, end_s) for i in range(num_connections)]
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", server.port)  # type: ignore[misc]
    # A busy server accepts few connections at a time: what is measured is how it answers those that it has.
    await asyncio.sleep(begin_s - time.perf_counter())
    for client in clients:
        client.begin()
    await asyncio.sleep(warm_s - time.perf_counter())
    cpu_s, warm_s = server.cpu_s(), time.perf_counter()
    await asyncio.sleep(end_s - time.perf_counter())
    cpu_s, wall_s = server.cpu_s() - cpu_s, time.perf_counter() - warm_s
    await asyncio.gather(*(client.done for client in clients))
    return Run(
        [latency for client in clients for latency in client.seconds],
        sum(client.num_refused for client in clients),
        wall_s,
        cpu_s,
    )


def row_of(kind: str, count: int, connections: int, run: Run) -> str:
    """Return a row of the table."""
    latencies = np.array(run.seconds) * 1e3
    rate = len(latencies) / run.wall_s
    p50, p99 = np.percentile(latencies, (50, 99))
    name = "JSON" if kind == JSON_TYPE else "Arrow"
    return (
        f"| {name} | {count} | {connections} | {rate:,.0f} | {rate * count:,.0f} | {p50:.2f} | {p99:.2f} | "
        f"{run.num_refused:,} | {run.cpu_s / max(len(latencies), 1) * 1e6:,.0f} |"
    )


if __name__ == "__main__":
    main()
