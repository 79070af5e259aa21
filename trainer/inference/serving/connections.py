"""uvicorn's HTTP protocol with bounds on what a client may hold: descriptors, memory and time.

uvicorn reads a head without end, waits for the rest of one for ever, and for a client that does not read its answer.
Here each connection has at most one deadline, for what it is in the middle of; one that is in the middle of nothing
when its bytes are read, as well-behaved ones are, never has any. A refusal is written, and what the client still sends
is read and dropped for a while: a connection closed with bytes unread is reset, and the refusal would be lost with it.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import resource
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from papilio.data_pipeline.errors import PapilioError
from papilio.trainer.inference.serving.serve_options import ServeOptions

logger = logging.getLogger(__name__)
BACKLOG = 2048
_ACCEPTS_AT_ONCE = 64
_ACCEPT_RETRY_S = 0.2
# Files of the package, of a second one while packages are swapped, of the interpreter and its libraries; connections
# that are refused because there are too many.
_OTHER_DESCRIPTORS = 128
MAX_HEAD_BYTES = 32 << 10
MAX_HEADERS = 100
_MAX_PIPELINED = 32
# How long a refused client may go on sending; a body that was refused, how often its limit.
_LINGER_S = 2.0
_MAX_DROPPED = 16
# What attaches a filter to a socket, and detaches it; <asm-generic/socket.h>, which Python's socket does not name.
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
# Classic BPF over a TCP header: drop what begins a connection (the flag SYN in byte 13), pass all else.
_DROP_SYN = [(0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)]
# The app itself tells a client that its body is late; this is for one that sends on after its answer.
_BODY_GRACE_S = 2.0


class _RefusedError(PapilioError):
    """Ends the parsing of a request; the answer says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(eq=False)
class ConnectionLimits:
    """What the connections of a process share.

    Attributes:
        options: of the server.
        max_connections: those of the options, or fewer where the system gives fewer descriptors.
        on_refused: told the status of an answer that no app gave.
        idle: connections that wait for a request, or have the rest of a refused one to send, the oldest first.
    """

    options: ServeOptions
    max_connections: int
    on_refused: Callable[[int], None]
    idle: dict[BoundedProtocol, None] = field(default_factory=dict)


class _ClosedWhenRead:
    """What writes the answer to a request: the connection's transport, but closing it waits for the request's end."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write, self.is_closing, self.close = transport.write, transport.is_closing, close


class BoundedProtocol(HttpToolsProtocol):
    """A connection."""

    def __init__(self, limits: ConnectionLimits, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._limits, self._options = limits, limits.options
        self._deadline: asyncio.TimerHandle | None = None
        self._send_deadline: asyncio.TimerHandle | None = None
        self._refusal: _RefusedError | None = None
        self._is_deaf = False  # what comes is dropped
        self._is_in_head = self._is_in_body = self._is_last = False
        self._num_head_bytes = self._num_headers = 0  # of the head and of trailers, names and values
        self._num_idle_bytes = 0  # read since the last progress: a whole head, or bytes of a body
        self._num_dropped = 0
        self._made_s = self.loop.time()
        self._has_asked = False
        self._is_closed_when_read = False  # the last answer is given, and the rest of its request still comes

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request; if there are too many connections, the one idle longest makes room."""
        super().connection_made(transport)
        limits = self._limits
        if len(self.connections) > limits.max_connections and not self._make_room():
            self._refuse(503, f"{limits.max_connections} connections are open already; try again later", linger_s=0)
            return
        limits.idle[self] = None
        self._set_deadline(self._options.head_timeout_s, self._on_late_head)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        super().connection_lost(exc)
        self._limits.idle.pop(self, None)
        self._clear_deadline()
        self.resume_writing()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer what was asked for before the client ended its side; return whether there is any such."""
        if self._is_in_head or self._is_in_body or self.cycle is None or self.cycle.response_complete:
            return False
        self.cycle.keep_alive = False
        return True

    def data_received(self, data: bytes) -> None:
        """Parse what came, and set a deadline for the rest of a request that is not whole."""
        if self._is_deaf:
            return
        self._num_idle_bytes += len(data)
        super().data_received(data)
        if self._is_deaf:
            return
        if not self._is_in_head and not self._is_in_body and not self._num_idle_bytes:
            self._clear_deadline()
            # What follows a request for another protocol, which is answered in this one, is of no known one.
            self._is_deaf = self._is_last
        elif self._num_idle_bytes > MAX_HEAD_BYTES + len(data):
            self._refuse(431, f"the head of a request, or what is around its body, exceeds {MAX_HEAD_BYTES:,} bytes")
        elif self._deadline is None:
            if self._is_in_body:
                self._set_deadline(self._options.body_timeout_s + _BODY_GRACE_S, self.transport.abort)
            else:
                self._set_deadline(self._options.head_timeout_s, self._on_late_head)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request; uvicorn calls this after any error in parsing."""
        refusal = self._refusal or _RefusedError(400, "what came is not a request of HTTP/1.1")
        self._refuse(refusal.status, str(refusal))

    def on_message_begin(self) -> None:
        """Begin a head."""
        super().on_message_begin()
        self._is_in_head = True
        self._num_head_bytes = self._num_headers = self._num_dropped = 0
        if self.transport.is_closing():
            self._stop_parsing(400, "a request after the last that is answered")  # for nobody to read
        if len(self.pipeline) >= _MAX_PIPELINED:
            self._stop_parsing(400, f"more than {_MAX_PIPELINED} requests before the first is answered")

    def on_url(self, url: bytes) -> None:
        """Take a part of the URL."""
        super().on_url(url)
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or one after the body."""
        super().on_header(name, value)
        self._num_headers += 1
        if self._num_headers > MAX_HEADERS:
            self._stop_parsing(431, f"a request may have {MAX_HEADERS} headers")
        self._count_head(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """Begin to answer."""
        if self.parser.should_upgrade() and self.parser.get_method() == b"POST":  # its body would not be parsed
            self._stop_parsing(400, "a request with a body cannot change the protocol; send it without Upgrade")
        super().on_headers_complete()
        self.cycle.transport = _ClosedWhenRead(self.transport, self._close_when_read)  # type: ignore[assignment]
        self._is_in_head, self._is_in_body = False, True
        self._has_asked = True
        self._num_idle_bytes = 0
        self._limits.idle.pop(self, None)
        self._clear_deadline()
        if self.parser.should_upgrade():
            self._is_last = True
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Take a part of the body, or drop it if the answer is given already."""
        super().on_body(body)
        self._num_idle_bytes = 0
        if self.cycle.response_complete:
            self._num_dropped += len(body)
            if self._num_dropped > _MAX_DROPPED * self._options.max_body_bytes:
                self.transport.abort()

    def on_message_complete(self) -> None:
        """End a request."""
        super().on_message_complete()
        self._is_in_body = False
        self._num_idle_bytes = 0
        if self._is_closed_when_read:
            self.transport.close()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the client to take the answer."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._set_deadline(self._options.send_timeout_s, self.transport.abort)
        elif not self.pipeline:
            self._limits.idle[self] = None

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, with what its client never took."""
        self.transport.abort()

    def pause_writing(self) -> None:
        """Give the client a while to take what was written."""
        super().pause_writing()
        if self._send_deadline is None:
            self._send_deadline = self.loop.call_later(self._options.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It has taken it."""
        super().resume_writing()
        if self._send_deadline is not None:
            self._send_deadline.cancel()
            self._send_deadline = None

    def _close_when_read(self) -> None:
        is_cut_short = self._is_in_body and not self.pipeline and self.cycle.response_complete
        if not is_cut_short or self.transport.is_closing() or not self.transport.can_write_eof():
            self.transport.close()
            return
        self._is_closed_when_read = True
        self.transport.write_eof()
        if self._deadline is None:
            self._set_deadline(_BODY_GRACE_S, self.transport.abort)

    def _make_room(self) -> bool:
        oldest = next(iter(self._limits.idle), None)
        if oldest is None:
            return False
        del self._limits.idle[oldest]
        oldest.transport.abort()
        return True

    def _count_head(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > MAX_HEAD_BYTES:
            self._stop_parsing(431, f"the head of a request exceeds {MAX_HEAD_BYTES:,} bytes")

    def _stop_parsing(self, status: int, message: str) -> None:
        self._refusal = _RefusedError(status, message)
        raise self._refusal

    def _on_late_head(self) -> None:
        self._deadline = None
        if self._is_in_head:
            self._refuse(408, "the head of the request did not arrive in time")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str, linger_s: float = _LINGER_S) -> None:
        """Answer in the app's place, and close the connection."""
        self._is_deaf = True
        self._clear_deadline()
        if self.transport.is_closing():
            return
        is_busy = self.cycle is not None and not self.cycle.response_complete
        if is_busy and not (self._is_in_body and not self.pipeline and not self.cycle.response_started):
            # Earlier requests are being answered: the last of these answers ends the connection.
            self.cycle.keep_alive = False
            return
        if is_busy:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._limits.on_refused(status)
        body = json.dumps({"error": message}, indent=1).encode() + b"\n"
        self.transport.write(
            STATUS_LINE[status]
            + b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n" % len(body)
            + (b"retry-after: 1\r\n\r\n" if status == 503 else b"\r\n")
            + body
        )
        if linger_s == 0 or not self.transport.can_write_eof():
            self.transport.close()
            self._set_deadline(_LINGER_S, self.transport.abort)
            return
        self.transport.write_eof()
        self._set_deadline(linger_s, self.transport.abort)

    def awaits_first_request(self, patience_s: float) -> bool:
        """Whether its client has connected lately and may be just about to send its first request."""
        is_open = not self._is_deaf and not self.transport.is_closing()
        return is_open and not self._has_asked and self.loop.time() - self._made_s < patience_s

    def shutdown(self) -> None:
        """Close it once nothing is to be answered; called when the server stops."""
        super().shutdown()
        if self.transport.is_closing():
            self._set_deadline(self._options.send_timeout_s, self.transport.abort)

    def _set_deadline(self, after_s: float, then: Callable[[], None]) -> None:
        self._clear_deadline()
        self._deadline = self.loop.call_later(after_s, then)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Acceptor:
    """Accepts connections, also when there are no descriptors left for a while.

    uvloop's own server closes its socket at the first EMFILE, without a word, and the port is dead from then on.
    """

    def __init__(self, listener: socket.socket, make_protocol: Callable[[], asyncio.Protocol]) -> None:
        self._listener, self._make_protocol = listener, make_protocol
        self._loop = asyncio.get_running_loop()
        self._beginnings: set[asyncio.Task[Any]] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._is_short = False

    def start(self) -> None:
        """Begin to listen.

        Raises:
            OSError: another socket, bound to the port at the same time, listens already.
        """
        self._listener.setblocking(False)
        self._listener.listen(BACKLOG)
        self._loop.add_reader(self._listener, self._accept)

    async def stop(self, half_open_s: float = 0.0, *, is_shared: bool = False) -> None:
        """Close the port, without losing those who are connected already but not accepted yet.

        Closing it resets the connections that the kernel has made since the last was accepted. So new ones are first
        kept out: their SYN is dropped, and is answered a second later, when it is sent again, by a refusal or by
        whoever has the port then.

        Args:
            half_open_s: how long those that are half open then, over a slow network, may take to open.
            is_shared: other processes go on accepting at the same socket.
        """
        if self._listener.fileno() < 0:
            return
        self._drop_new()
        await asyncio.sleep(half_open_s)
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self._listener)
        self._drop_new()  # another process that stops may have let them in again
        try:
            while self._accept_some():
                pass
        except OSError as error:
            logger.error("connections that were waiting are lost: %s; raise ulimit -n", error)
        if is_shared:
            with suppress(OSError):
                self._listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
        self._listener.close()
        if self._beginnings:
            await asyncio.wait(self._beginnings)

    def _drop_new(self) -> None:
        code = b"".join(struct.pack("HBBI", *instruction) for instruction in _DROP_SYN)
        buffer = ctypes.create_string_buffer(code, len(code))
        program = struct.pack("HL", len(_DROP_SYN), ctypes.addressof(buffer))  # struct sock_fprog
        with suppress(OSError):  # where there are no such filters, a few may be reset
            self._listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)

    def _accept(self) -> None:
        try:
            self._accept_some()
        except OSError as error:
            self._loop.remove_reader(self._listener)
            self._retry = self._loop.call_later(_ACCEPT_RETRY_S, self._resume)
            if not self._is_short:
                logger.error("no connection can be accepted (%s): lower --max-connections or raise ulimit -n", error)
            self._is_short = True
        else:
            self._is_short = False

    def _resume(self) -> None:
        self._retry = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept_some(self) -> bool:
        """Accept a few connections; whether more may be waiting."""
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return False
            except ConnectionAbortedError:
                continue
            connection.setblocking(False)
            with suppress(OSError):  # it has gone already
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = self._loop.create_task(self._begin(connection))
            self._beginnings.add(task)
            task.add_done_callback(self._beginnings.discard)
        return True

    async def _begin(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection)
        except OSError:
            connection.close()


def possible_connections(wanted: int) -> int:
    """Return how many of the wanted connections the limit of descriptors allows, raised as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    possible = wanted if soft == resource.RLIM_INFINITY else min(wanted, max(2, soft - _OTHER_DESCRIPTORS))
    if possible < wanted:
        logger.warning(
            "at most %d connections, not %d (--max-connections): this process may have %d descriptors; raise ulimit -n",
            possible,
            wanted,
            soft,
        )
    return possible
