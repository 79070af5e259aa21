"""A server in a process of its own, packages for it, and clients."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa

from benchmarks.random_package import make_package
from papilio.data_pipeline.schema import CategoricalColumn, DenseColumn, Schema
from papilio.trainer.config import ModelConfig

# A bound for a busy machine; nothing waits for it to pass.
START_TIMEOUT_S = 180
JSON_TYPE = "application/json"
ARROW_TYPE = "application/vnd.apache.arrow.stream"
SCHEMA = Schema(
    label="click",
    dense=(DenseColumn(name="price"), DenseColumn(name="age", transform="identity", missing_value=-1.0)),
    categorical=(
        CategoricalColumn(name="city"),
        CategoricalColumn(name="tags", multi_hot=True, separator="|"),
        CategoricalColumn(name="item", kind="hex", encoding="hash", num_buckets=5000),
        CategoricalColumn(name="slot", kind="integer", encoding="identity", num_buckets=9),
    ),
)
COLUMNS = [*SCHEMA.dense_names, *SCHEMA.categorical_names]
VOCABULARIES = {"city": ["Ulm", "Köln", "Rom"], "tags": [f"tag{i}" for i in range(40)]}
MODEL = ModelConfig(
    embedding_dim=8, dense_arch_layer_sizes=(32,), over_arch_layer_sizes=(64,), table_pooling={"tags": "mean"}
)


def records_of(first: int, count: int) -> list[dict[str, object]]:
    """Records that all differ."""
    return [
        {
            "price": i * 1.5 if i % 5 else None,
            "age": i % 90,
            "city": ["Ulm", "Köln", "Rom", "Bonn"][i % 4],
            "tags": [f"tag{(i * k) % 50}" for k in range(i % 4)],
            "item": f"{i * 7919 % 2**32:08x}",
            "slot": i % 9,
        }
        for i in range(first, first + count)
    ]


def text_rows(records: list[dict[str, object]], *, label: bool) -> list[str]:
    """Lines of a CSV file, the header first; labels are 0 and 1 in turns."""
    rows = [",".join([SCHEMA.label] * label + COLUMNS)]
    for i, record in enumerate(records):
        fields = [str(i % 2)] * label
        for name in COLUMNS:
            value = record[name]
            fields.append("" if value is None else "|".join(value) if isinstance(value, list) else str(value))
        rows.append(",".join(fields))
    return rows


def write_package(folder: Path, seed: int) -> str:
    """A small package with every kind of column; another seed, other weights."""
    make_package(str(folder), SCHEMA, MODEL, records_of(0, 3), vocabularies=VOCABULARIES, seed=seed, name="shop")
    return str(folder)


def json_body(records: list[dict[str, object]]) -> bytes:
    return json.dumps({"records": records}).encode()


def arrow_body(records: list[dict[str, object]]) -> bytes:
    table = pa.Table.from_pylist(records)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read_scores(kind: str, body: bytes) -> list[float]:
    if kind == JSON_TYPE:
        return json.loads(body)["probabilities"]
    return pa.ipc.open_stream(body).read_all().column("probability").to_pylist()


class ServerProcess:
    """`python -m papilio.trainer.inference.serving.main` with its log in a file."""

    def __init__(self, log: Path, package: str, **options: object) -> None:
        self.log = log
        # A busy machine may stop for seconds: that alone is no overload.
        settings = {"package": package, "port": 0, "drain_s": 0.3, "max_delay_ms": 60_000} | options
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "papilio.trainer.inference.serving.main", json.dumps(settings)],
                stderr=file,
                env=environment,
            )

    def wait_until_ready(self, num_processes: int = 1) -> ServerProcess:
        """Wait until it says so, and note its port."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(found := re.findall(r"is served on http://127\.0\.0\.1:(\d+)", self.text())) < num_processes:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)
        self.port = int(found[0])
        return self

    def text(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def request(self, method: str, path: str, body: bytes = b"", kind: str = JSON_TYPE):
        """Return (status, headers, body) of a request on a connection of its own."""
        connection = self.connect()
        try:
            connection.request(method, path, body, {"content-type": kind} if body else {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def predict(self, records: list[dict[str, object]], kind: str = JSON_TYPE):
        body = json_body(records) if kind == JSON_TYPE else arrow_body(records)
        return self.request("POST", "/predict", body, kind)

    def figures(self) -> dict[str, float]:
        """Values of /metrics by name with labels, each line held against the format's grammar."""
        _, _, body = self.request("GET", "/metrics")
        figures = {}
        for line in body.decode().splitlines():
            if line.startswith("#"):
                assert re.fullmatch(r"# (HELP [a-z_]+ .+|TYPE [a-z_]+ (counter|gauge|histogram))", line), line
                continue
            match = re.fullmatch(r'([a-z_]+(?:\{(?:[a-z_]+="[^"]*",?)*\})?) (\S+)', line)
            assert match, line
            assert match[1] not in figures, line
            figures[match[1]] = float(match[2])
        return figures

    def hang_up(self) -> None:
        self.process.send_signal(signal.SIGHUP)

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while text not in self.text():
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(START_TIMEOUT_S)


class Load:
    """Clients in threads that send requests one after the other; what is not answered is a failure.

    Every other client makes a new connection for each request. A client ends when it is told to close its connection
    by a server that then refuses new ones, which is how a server in order stops.
    """

    def __init__(self, server: ServerProcess, num_clients: int, records_per_request: int = 3) -> None:
        self.answers: list[tuple[int, int, str | None, list[float]]] = []
        self.failures: list[str] = []
        self._server, self._num_records = server, records_per_request
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def wait_for(self, num_answers: int) -> None:
        """Wait for so many more answers."""
        wanted = len(self.answers) + num_answers
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(self.answers) < wanted and not self.failures:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def end(self) -> None:
        self._is_over.set()
        self.join()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(START_TIMEOUT_S)
            assert not thread.is_alive()

    def _run(self, client: int) -> None:
        number, connection = client, None
        while not self._is_over.is_set():
            if connection is None:
                connection = self._server.connect()
                try:
                    connection.connect()
                    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                except ConnectionRefusedError:
                    return
            try:
                body = json_body(records_of(number, self._num_records))
                connection.request("POST", "/predict", body, {"content-type": JSON_TYPE})
                response = connection.getresponse()
                scores = json.loads(response.read()).get("probabilities", [])
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.failures.append(f"client {client}: {error!r}")
                return
            self.answers.append((number, response.status, response.headers["x-papilio-package"], scores))
            number += 17
            if client % 2 or response.headers["connection"] == "close":
                connection.close()
                connection = None
