"""Clients that want to take the server down, or are just broken: each is told so, and the others are served."""

import asyncio
import json
import logging
import os
import resource
import socket

import pytest

from tests.support.hostile import Bench, serve_to
from tests.support.served import json_body, records_of, write_package
from trainer.inference.sample_check import load_checked_scorer
from trainer.inference.serving.connections import possible_connections
from trainer.inference.serving.main import bind
from trainer.inference.serving.serve_options import ServeError, ServeOptions

QUICK = {"head_timeout_s": 0.3, "body_timeout_s": 0.3, "send_timeout_s": 0.3, "max_body_bytes": 20_000}
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
