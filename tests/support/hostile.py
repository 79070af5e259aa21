"""The whole server but its process, on loopback in this one, and clients that write what they like to it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import uvicorn
import uvloop
from uvicorn.server import ServerState

from papilio.trainer.inference.scorer import Scorer
from papilio.trainer.inference.serving.app import ServingApp
from papilio.trainer.inference.serving.connections import Acceptor, BoundedProtocol, ConnectionLimits
from papilio.trainer.inference.serving.metrics import Metrics
from papilio.trainer.inference.serving.micro_batcher import MicroBatcher
from papilio.trainer.inference.serving.serve_options import ServeOptions

PATIENCE_S = 60


class Client:
    """A connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        """Write, if the server still listens."""
        with suppress(OSError, RuntimeError):  # uvloop's word for a closed connection is the latter
            self.writer.write(data)
            await self.writer.drain()

    async def rest(self) -> bytes:
        """All that the server sends until it closes the connection, which it must."""
        parts = []
        with suppress(ConnectionResetError):
            async with asyncio.timeout(PATIENCE_S):
                while part := await self.reader.read(1 << 16):
                    parts.append(part)
        return b"".join(parts)


class Bench:
    """What a scenario is given."""

    def __init__(self, port: int, metrics: Metrics, state: ServerState) -> None:
        self.port, self.metrics, self.state = port, metrics, state

    async def connect(self) -> Client:
        """Open a connection."""
        return Client(*await asyncio.open_connection("127.0.0.1", self.port))

    async def answer(self, data: bytes) -> bytes:
        """What comes for bytes that are sent on a connection of their own, until it is closed."""
        client = await self.connect()
        await client.send(data)
        found = await client.rest()
        client.writer.close()
        return found

    async def is_healthy(self) -> bool:
        """Whether a well-behaved client is answered."""
        return (await self.answer(b"GET /healthz HTTP/1.1\r\nconnection: close\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


def serve_to(scenario: Callable[[Bench], Awaitable[None]], scorer: Scorer, **options: object) -> None:
    """Run the coroutine `scenario(bench)` beside a server with these options."""

    async def run() -> None:
        settings, metrics = ServeOptions(package="none", **options), Metrics()
        batcher = MicroBatcher(scorer, settings, metrics)
        limits = ConnectionLimits(
            settings, settings.max_connections, lambda status: metrics.record_request("other", status, 0)
        )
        config = uvicorn.Config(ServingApp(batcher, settings, metrics), ws="none", log_config=None, access_log=False)
        config.load()
        state = ServerState()
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)  # so that it is soon full
        acceptor = Acceptor(listener, partial(BoundedProtocol, limits, config=config, server_state=state, app_state={}))
        acceptor.start()
        try:
            await scenario(Bench(listener.getsockname()[1], metrics, state))
        finally:
            await acceptor.stop()
            batcher.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
