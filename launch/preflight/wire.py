"""Messages between the hosts of a preflight: one JSON value a line over plain TCP, each with a deadline."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from typing import Any

# The longest message is the facts of all hosts, some KB each.
MAX_LINE_BYTES = 64 << 20
RECEIVE_BYTES = 1 << 16
TAKEN = (errno.EADDRINUSE, errno.EACCES)


class SilenceError(ValueError):
    """The other side closed the connection, sent no whole line in time, or what it sent is not ours."""


class Line:
    """A connection on which both sides send lines."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over an open connection."""
        self._connection = connection
        self._pending = b""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def own_address(self) -> str:
        """The address of this side."""
        return plain_address(self._connection.getsockname()[0])

    def send(self, value: Any, timeout_s: float) -> None:
        """Send one value.

        Raises:
            SilenceError: the other side is gone, or takes nothing.
        """
        try:
            self._connection.settimeout(timeout_s)
            self._connection.sendall(json.dumps(value).encode() + b"\n")
        except OSError as error:
            raise SilenceError(f"the connection broke: {error.strerror or error}") from None

    def receive(self, timeout_s: float) -> Any:
        """Return the next value.

        Raises:
            SilenceError: none came in time, the other side is gone, or it does not speak JSON.
        """
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            if len(self._pending) > MAX_LINE_BYTES:
                raise SilenceError("what answers there is no preflight: its first line does not end")
            self._pending += self._receive_some(deadline - time.monotonic(), timeout_s)
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            return json.loads(line)
        except ValueError:
            raise SilenceError(f"what answers there is no preflight: it sent {line[:40]!r}") from None

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _receive_some(self, left_s: float, timeout_s: float) -> bytes:
        try:
            self._connection.settimeout(max(left_s, 1e-3))
            received = self._connection.recv(RECEIVE_BYTES)
        except TimeoutError:
            raise SilenceError(f"no answer within {timeout_s:g} s") from None
        except OSError as error:
            raise SilenceError(f"the connection broke: {error.strerror or error}") from None
        if not received:
            raise SilenceError("the other side closed the connection")
        return received


def listen(port: int) -> socket.socket:
    """Listen on a port of all addresses of this host, IPv4 and IPv6; port 0 takes a free one.

    Raises:
        OSError: another program has the port.
    """
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
        except OSError as error:
            if error.errno in TAKEN:
                raise
    return socket.create_server(("", port), backlog=512)


def free_port() -> int:
    """Return a port that no program has at the moment."""
    with listen(0) as probe:
        return int(probe.getsockname()[1])


def plain_address(address: str) -> str:
    """Return an IPv4 address that was seen through an IPv6 socket as IPv4."""
    return address.removeprefix("::ffff:").partition("%")[0]


def why_not(error: OSError) -> str:
    """Say in few words why a connection failed."""
    if isinstance(error, TimeoutError):
        return "no answer"
    if isinstance(error, socket.gaierror):
        return "the name does not resolve"
    # Not the error's own text, to which Python adds what it was doing.
    return (os.strerror(error.errno) if error.errno else str(error)).lower()
