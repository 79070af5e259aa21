"""How a server stops: who is connected is answered, who comes too late is refused, and nobody is reset."""

import asyncio
import errno
import json
import socket
from functools import partial

import pytest
import uvicorn
import uvloop

from papilio.trainer.inference.package.sample_check import load_checked_scorer
from papilio.trainer.inference.serving import server as serving
from papilio.trainer.inference.serving.app import ServingApp
from papilio.trainer.inference.serving.connections import Acceptor, BoundedProtocol, ConnectionLimits
from papilio.trainer.inference.serving.metrics import Metrics
from papilio.trainer.inference.serving.micro_batcher import MicroBatcher
from papilio.trainer.inference.serving.serve_options import ServeOptions
from tests.support.hostile import PATIENCE_S, Client
from tests.support.served import write_package

REQUEST = b"GET /healthz HTTP/1.1\r\n\r\n"


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return load_checked_scorer(write_package(tmp_path_factory.mktemp("package") / "shop", 0))


def run(scenario) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(6 * PATIENCE_S):
            await scenario()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(bounded())


def drain(scorer, scenario, **options) -> None:
    """Run the coroutine `scenario(server, port)` beside a server, which has to end after it."""

    async def whole() -> None:
        settings, metrics = ServeOptions(package="none", **options), Metrics()
        batcher = MicroBatcher(scorer, settings, metrics)
        app, limits = ServingApp(batcher, settings, metrics), ConnectionLimits(settings, 100, print)
        config = uvicorn.Config(
            app, http=partial(BoundedProtocol, limits), ws="none", lifespan="off", log_config=None, access_log=False
        )
        listener, started = socket.create_server(("127.0.0.1", 0)), asyncio.Event()
        server = serving._Server(config, app, listener, settings.drain_s, started.set)
        task = asyncio.create_task(server.serve([listener]))
        await started.wait()
        await scenario(server, listener.getsockname()[1])
        await task
        assert listener.fileno() < 0, "the port is closed"
        batcher.close()

    run(whole)


async def connect(port: int) -> Client:
    return Client(*await asyncio.open_connection("127.0.0.1", port))


def test_who_has_just_connected_is_answered_though_the_port_is_closed(scorer, monkeypatch) -> None:
    monkeypatch.setattr(serving, "FIRST_REQUEST_S", PATIENCE_S)

    async def scenario(server: serving._Server, port: int) -> None:
        client = await connect(port)
        server.begin_drain()
        while server._listener.fileno() >= 0:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # three ticks of uvicorn, which would close it at the first
        await client.send(REQUEST)
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ") and b"connection: close" in head
        assert json.loads(body) == {"status": "ok"}

    drain(scorer, scenario, drain_s=0.0)


def test_who_says_nothing_delays_the_end_for_a_while_only(scorer, monkeypatch) -> None:
    monkeypatch.setattr(serving, "FIRST_REQUEST_S", 0.05)

    async def scenario(server: serving._Server, port: int) -> None:
        clients = [await connect(port) for _ in range(3)]
        await clients[1].send(b"GET /half HTTP/1.1\r\nhost: ")
        server.begin_drain()
        assert [await client.rest() for client in clients] == [b""] * 3

    drain(scorer, scenario, drain_s=0.0)


def test_who_comes_while_the_port_is_being_closed_is_refused_and_not_reset() -> None:
    """A connection that the kernel made after the last was accepted would be reset with the request it carries."""

    async def scenario() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        acceptor = Acceptor(listener, asyncio.Protocol)
        acceptor.start()
        stopping = asyncio.create_task(acceptor.stop(half_open_s=0.1))
        await asyncio.sleep(0)
        with pytest.raises(ConnectionRefusedError):
            await connect(listener.getsockname()[1])
        await stopping

    run(scenario)


def test_a_socket_that_others_share_lets_new_ones_in_again() -> None:
    async def scenario() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        with listener.dup() as shared:
            acceptor = Acceptor(listener, asyncio.Protocol)
            acceptor.start()
            await acceptor.stop(is_shared=True)
            client = await connect(shared.getsockname()[1])
            connection, _ = shared.accept()
            connection.close()
            client.writer.close()

    run(scenario)


def test_a_port_is_closed_even_if_no_descriptor_is_left(caplog, monkeypatch) -> None:
    async def scenario() -> None:
        acceptor = Acceptor(socket.create_server(("127.0.0.1", 0)), asyncio.Protocol)
        acceptor.start()

        def accept_none() -> bool:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(acceptor, "_accept_some", accept_none)
        await acceptor.stop()
        assert acceptor._listener.fileno() < 0

    run(scenario)
    assert "connections that were waiting are lost: [Errno 24] Too many open files; raise ulimit -n" in caplog.text
