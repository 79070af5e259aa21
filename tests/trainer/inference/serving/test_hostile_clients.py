"""Clients that want to take the server down, or are just broken: each is told so, and the others are served."""

import asyncio
import datetime
import decimal
import json
import logging
import os
import resource
import shutil
import socket
from collections.abc import Callable
from types import SimpleNamespace

import pyarrow as pa
import pytest
import uvicorn

from papilio.trainer.inference.package.format import MANIFEST, TABLES
from papilio.trainer.inference.package.sample_check import load_checked_scorer
from papilio.trainer.inference.serving.connections import Acceptor, possible_connections
from papilio.trainer.inference.serving.main import bind
from papilio.trainer.inference.serving.metrics import Metrics
from papilio.trainer.inference.serving.package_swap import PackageSwap
from papilio.trainer.inference.serving.serve_options import ServeError, ServeOptions
from papilio.trainer.inference.serving.server import _Server
from tests.support.hostile import Bench, serve_to
from tests.support.served import ARROW_TYPE, COLUMNS, SCHEMA, json_body, records_of, write_package

# Quick, yet longer than a busy machine lets this process, which is server and client in one, stand still.
QUICK = {"head_timeout_s": 1.5, "body_timeout_s": 1.5, "send_timeout_s": 1.5, "max_body_bytes": 20_000}
POST = b"POST /predict HTTP/1.1\r\ncontent-type: application/json\r\n"
GET = b"GET /readyz HTTP/1.1\r\n"
BODY = json_body(records_of(0, 1))


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return load_checked_scorer(write_package(tmp_path_factory.mktemp("package") / "shop", 0))


def length(count: int) -> bytes:
    return b"content-length: %d\r\n" % count


@pytest.mark.parametrize(
    ("sent", "status", "error"),
    [
        (GET + b"x: " + b"a" * 400_000, 431, "exceeds 32,768 bytes"),
        (GET + b"x: " + b"a" * 40_000 + b"\r\n\r\n", 431, "the head of a request exceeds 32,768 bytes"),
        (GET + b"x: y\r\n" * 101 + b"\r\n", 431, "a request may have 100 headers"),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n", 431, "the head of a request exceeds"),
        (GET + b"x: y", 408, "the head of the request did not arrive in time"),
        (POST + length(50) + b"\r\n{", 408, "the body did not arrive in time"),
        (POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n", 408, "the body did not arrive in time"),
        (POST + b"transfer-encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 200, 431, "a request may have 100 headers"),
        (POST + b"transfer-encoding: chunked\r\n\r\n2;" + b"x" * 400_000, 431, "what is around its body, exceeds"),
        (POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400, "what came is not a request of HTTP/1.1"),
        (POST + length(2) + length(3) + b"\r\n{}x", 400, "what came is not a request"),
        (POST + b"content-length: -1\r\n\r\n{}", 400, "what came is not a request"),
        (POST + b"content-length: 2x\r\n\r\n{}", 400, "what came is not a request"),
        (POST + length(2) + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400, "what came is not a request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200, 400, "what came is not a request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "what came is not a request"),
        (b"CONNECT example.org:1 HTTP/1.1\r\n\r\n", 400, "what came is not a request"),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400, "what came is not a request"),
        (POST + b"connection: upgrade\r\nupgrade: h2c\r\n" + length(2) + b"\r\n{}", 400, "send it without Upgrade"),
        (POST + length(99_999) + b"expect: 100-continue\r\n\r\n", 413, "99,999 bytes, at most 20,000 are allowed"),
        (POST + b"connection: close\r\n" + length(5) + b"\r\n\xef\xbb\xbf{}", 400, "begins with a byte order mark"),
        (POST + b"content-encoding: gzip\r\nconnection: close\r\n" + length(2) + b"\r\n{}", 415, "encoded as 'gzip'"),
    ],
)
def test_what_is_wrong_with_a_request_is_told_and_its_connection_closed(scorer, caplog, sent, status, error) -> None:
    async def scenario(bench: Bench) -> None:
        head, _, body = (await bench.answer(sent)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status), head
        assert error in json.loads(body)["error"]
        assert b"connection: close" in head
        assert await bench.is_healthy()
        assert len(bench.state.connections) <= 1

    serve_to(scenario, scorer, **QUICK)
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("sent", [b"", b"\r\n" * 5])
def test_who_says_nothing_is_let_go_without_a_word(scorer, sent) -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.answer(sent) == b""

    serve_to(scenario, scorer, **QUICK)


@pytest.mark.parametrize(
    ("sent", "num_answers"),
    [
        (b"GET /readyz HTTP/1.0\r\n\r\n", 1),
        (GET + b"\r\n" + GET + b"\r\n" + GET + b"connection: close\r\n\r\n", 3),
        (GET + b"connection: upgrade\r\nupgrade: websocket\r\n\r\nnoise", 1),
        (POST + b"connection: close\r\nexpect: 100-continue\r\n" + length(len(BODY)) + b"\r\n" + BODY, 1),
    ],
)
def test_unusual_requests_are_answered(scorer, sent, num_answers) -> None:
    async def scenario(bench: Bench) -> None:
        found = await bench.answer(sent)
        assert found.count(b"HTTP/1.1 200 OK") == num_answers, found
        assert found.count(b"HTTP/1.1 ") == num_answers + found.count(b"100 Continue")

    serve_to(scenario, scorer, **QUICK)


def test_more_requests_than_may_be_sent_ahead_end_the_connection_after_those_that_may(scorer) -> None:
    async def scenario(bench: Bench) -> None:
        found = await bench.answer((GET + b"\r\n") * 500)
        assert 1 <= found.count(b"HTTP/1.1 200 OK") <= 40
        assert await bench.is_healthy()

    serve_to(scenario, scorer, **QUICK)


def test_who_sends_on_after_a_refusal_has_read_it_and_is_cut_off(scorer) -> None:
    async def scenario(bench: Bench) -> None:
        client = await bench.connect()
        await client.send(POST + length(10**9) + b"\r\n")
        assert (await client.reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 413 ")
        for _ in range(100):  # 16 times what a body may have is dropped
            await client.send(b"x" * 60_000)
            await asyncio.sleep(0)
        await client.rest()
        assert await bench.is_healthy()

    serve_to(scenario, scorer, **QUICK | {"body_timeout_s": 1000.0})


def test_who_closes_after_a_request_and_sends_it_whole_reads_why_it_is_refused(scorer) -> None:
    async def scenario(bench: Bench) -> None:
        sent = POST + b"connection: close\r\n" + length(200_000) + b"\r\n" + b"x" * 200_000
        for _ in range(5):
            client = await bench.connect()
            await client.send(sent)
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 413 ")
            assert "200,000 bytes, at most 20,000 are allowed" in json.loads(await client.reader.read())["error"]
            client.writer.close()
        assert await bench.is_healthy()

    serve_to(scenario, scorer, **QUICK)


def test_who_ends_its_side_after_a_request_is_answered(scorer) -> None:
    async def scenario(bench: Bench) -> None:
        client = await bench.connect()
        await client.send((POST + length(len(BODY)) + b"\r\n" + BODY) * 2)
        client.writer.write_eof()
        answers = await client.rest()
        assert answers.count(b"HTTP/1.1 200 ") == answers.count(b'{"probabilities": [') == 2
        client.writer.close()
        assert await bench.is_healthy()

    serve_to(scenario, scorer, **QUICK)


def test_who_does_not_read_answers_is_cut_off(scorer) -> None:
    async def scenario(bench: Bench) -> None:
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        await asyncio.get_running_loop().sock_connect(deaf, ("127.0.0.1", bench.port))
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            async with asyncio.timeout(20):
                while True:  # until the connection is cut
                    await asyncio.get_running_loop().sock_sendall(deaf, b"GET /metrics HTTP/1.1\r\n\r\n" * 20)
        deaf.close()
        assert await bench.is_healthy()

    serve_to(scenario, scorer, **QUICK)


def test_the_connection_that_is_idle_longest_makes_room(scorer) -> None:
    async def scenario(bench: Bench) -> None:
        clients = [await bench.connect() for _ in range(4)]
        await clients[0].send(GET + b"\r\n")  # the others have waited longer then
        assert (await clients[0].reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        await clients[1].send(GET + b"half: a head")
        for _ in range(3):
            assert await bench.is_healthy()
        assert await clients[1].rest() == b""
        await clients[0].send(GET + b"connection: close\r\n\r\n")
        assert b"HTTP/1.1 200 OK" in await clients[0].rest()
        for client in clients:
            client.writer.close()

    serve_to(scenario, scorer, max_connections=4, max_requests=3)


def test_running_out_of_descriptors_stops_nothing_for_good(scorer, caplog) -> None:
    async def scenario(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        clients = [socket.socket() for _ in range(3)]
        for client in clients:
            client.setblocking(False)
        with open(os.devnull) as lowest_free:
            limit = lowest_free.fileno()
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            for client in clients:
                await loop.sock_connect(client, ("127.0.0.1", bench.port))
            while "no connection can be accepted" not in caplog.text:
                await asyncio.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for client in clients:
            await loop.sock_sendall(client, GET + b"\r\n")
            assert (await loop.sock_recv(client, 12)) == b"HTTP/1.1 200"
            client.close()
        assert caplog.text.count("no connection can be accepted") == 1

    with caplog.at_level(logging.ERROR):
        serve_to(scenario, scorer)


def test_connections_are_as_many_as_descriptors_allow(caplog, monkeypatch) -> None:
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    assert possible_connections(100) == 100
    assert limits == []
    assert possible_connections(500) == 500
    assert possible_connections(2000) == 1024 - 128
    assert limits == [(628, 1024), (1024, 1024)]
    assert "at most 896 connections, not 2000 (--max-connections)" in caplog.text


def test_requests_never_take_all_connections() -> None:
    with pytest.raises(ValueError, match=r"max_connections \(512\) must be more than max_requests \(512\)"):
        ServeOptions(package="p", max_connections=512)


@pytest.mark.parametrize("host", ["256.0.0.1", "no.such.host.invalid", "a" * 70, "..", "192.0.2.1", ""])
def test_a_host_that_cannot_be_listened_on_is_told_in_a_line(host) -> None:
    with pytest.raises(ServeError, match=r"^cannot listen on .* port 8123: .*; choose another --port .*, or --host$"):
        bind(host, 8123)


DAY = datetime.datetime(2026, 1, 2, 3, 4, 5)
VALUES = [
    pa.array([True, None]),
    pa.array([0.5, float("nan")], pa.float16()),
    pa.array([0.5, 1e30]),
    pa.array([2**64 - 1, 1], pa.uint64()),
    pa.array([-1, None], pa.int8()),
    pa.array([decimal.Decimal("1.5"), None]),
    pa.array([decimal.Decimal(10) ** 60, None], pa.decimal256(70, 2)),
    pa.array([DAY, None], pa.timestamp("ns")),
    pa.array([DAY, None], pa.timestamp("s", "Europe/Rome")),
    pa.array([DAY.date(), None]),
    pa.array([DAY.date(), None], pa.date64()),
    pa.array([DAY.time(), None]),
    pa.array([datetime.timedelta(1), None]),
    pa.array([(1, 2, 3), None], pa.month_day_nano_interval()),
    pa.array([b"\xff\xfe", b"\0"]),
    pa.array([b"ab", None], pa.binary(2)),
    pa.array([b"ab", None], pa.binary_view()),
    pa.array(["x" * 90_000, "\n\x1b[31m"]),
    pa.array(["", None], pa.string_view()),
    pa.nulls(2),
    pa.array([[None], None], pa.list_(pa.null())),
    pa.array([["a"], None]),
    pa.array([[0.5], [DAY.timestamp()]]),
    pa.array([[DAY], None]),
    pa.array([[True], None]),
    pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)),
    pa.array([[[1]], None]),
    pa.array([{"a": 1}, None]),
    pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int8())),
    pa.array([["a"], None], pa.list_view(pa.string())),
    pa.UnionArray.from_dense(pa.array([0, 0], pa.int8()), pa.array([0, 1], pa.int32()), [pa.array([1, 2])]),
    pa.RunEndEncodedArray.from_arrays([2], ["x"]),
    pa.array([b"0" * 16, None], pa.uuid()),
    pa.array(["{}", None], pa.json_()),
    pa.array(["a", None]).dictionary_encode(),
    pa.array([DAY, None]).dictionary_encode(),
]


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_any_type_are_scored_or_refused_in_a_line(scorer, caplog, name) -> None:
    sound = pa.Table.from_pylist(records_of(1, 2))

    async def scenario(bench: Bench) -> None:
        for values in VALUES:
            sink = pa.BufferOutputStream()
            table = sound.set_column(sound.column_names.index(name), name, values)
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            body = sink.getvalue().to_pybytes()
            head = b"POST /predict HTTP/1.1\r\nconnection: close\r\ncontent-type: " + ARROW_TYPE.encode() + b"\r\n"
            answer = await bench.answer(head + length(len(body)) + b"\r\n" + body)
            status, content = int(answer[9:12]), answer.partition(b"\r\n\r\n")[2]
            assert status in {200, 400}, (values.type, content)
            if status == 400:
                error = json.loads(content)["error"]
                assert f"column {name}" in error or "its score is not a finite number" in error
                assert error.isprintable()
                assert len(error) <= 500

    serve_to(scenario, scorer)
    assert caplog.text == ""


class Watched:
    """A watch over a folder, whose packages are loaded by a function of the test."""

    def __init__(self, folder: str, load: Callable[[], object]) -> None:
        self.batcher = SimpleNamespace(scorer=named("first"))
        self.swap = PackageSwap(ServeOptions(package=folder), self.batcher, Metrics())
        self.swap._load = load
        self._task = asyncio.get_running_loop().create_task(self.swap.watch(0.005))

    async def wait_for(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                assert not self._task.done()
                await asyncio.sleep(0.005)


def named(label: str) -> SimpleNamespace:
    return SimpleNamespace(label=label, encoder=SimpleNamespace(schema=SCHEMA))


class Panic(BaseException):
    """What safetensors raises, and no `except Exception` catches."""


@pytest.mark.parametrize(
    "error",
    [
        *(KeyError("a"), RuntimeError("b"), MemoryError(), TypeError("x\ny" * 1000), OSError(5, "Input/output error")),
        *(RecursionError(), UnicodeDecodeError("utf-8", b"", 0, 1, "c"), SystemExit(3), Panic("d"), AssertionError()),
    ],
    ids=repr,
)
def test_a_watch_survives_whatever_a_package_makes_its_reader_raise(tmp_path, caplog, error) -> None:
    outcomes: list[BaseException | object] = [error, named("second")]

    def load() -> object:
        outcome = outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def scenario() -> None:
        (tmp_path / MANIFEST).write_text("1")
        watched = Watched(str(tmp_path), load)
        (tmp_path / MANIFEST).write_text("22")
        os.utime(tmp_path / MANIFEST, ns=(1, 1))
        await watched.wait_for(lambda: "package refused, first keeps serving: " in caplog.text)
        assert watched.batcher.scorer.label == "first"
        (tmp_path / TABLES).write_text("the rest of it")  # the manifest stays: it was there first
        await watched.wait_for(lambda: watched.batcher.scorer.label == "second")

    asyncio.run(scenario())
    (line,) = (record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)
    assert line.isprintable()
    assert len(line) < 600
    assert "Traceback" not in caplog.text


def test_a_watch_survives_a_folder_that_goes_and_comes(tmp_path, caplog) -> None:
    async def scenario() -> None:
        folder = tmp_path / "package"
        folder.mkdir()
        (folder / MANIFEST).write_text("1")
        looks = []
        watched = Watched(str(folder), lambda: looks.append(1) or named("second"))
        shutil.rmtree(folder)
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert looks == []
        folder.mkdir()
        (folder / MANIFEST).write_text("1")
        os.utime(folder / MANIFEST, ns=(1, 1))
        await watched.wait_for(lambda: watched.batcher.scorer.label == "second")

    asyncio.run(scenario())


def test_two_servers_that_bound_a_port_at_once_are_told_apart_in_a_line() -> None:
    async def scenario() -> None:
        first = bind("127.0.0.1", 0)
        port = first.getsockname()[1]
        second = bind("127.0.0.1", port)  # possible while nobody listens: both were loading their packages
        Acceptor(first, asyncio.Protocol).start()
        server = _Server(uvicorn.Config("none"), SimpleNamespace(), second, 0, lambda: None)
        server.lifespan = SimpleNamespace(startup=lambda: asyncio.sleep(0), should_exit=False, state={})
        with pytest.raises(ServeError, match=rf"^cannot listen on http://127.0.0.1:{port}: Address already in use; "):
            await server.startup()
        asyncio.get_running_loop().remove_reader(first)
        first.close()
        second.close()

    asyncio.run(scenario())
