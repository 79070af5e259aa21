"""The store of a rendezvous, and a connection to it that is replaced when it stops answering."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from threading import Thread
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

from papilio.data_pipeline.errors import PapilioError

# How long a request to the store may take. On a loaded host threads come late.
logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 3.0
RETRY_S = 0.5
# For what agents write for each other right after they met.
READ_TIMEOUT_S = 60
NOTIFY_AFTER_S = 3.0
# What a client of torch's store says first (TCPStore.cpp: "validate" with a magic number, "ping" with a nonce, which
# comes back): to find out what listens at a port before torch's own client, which tries for a minute and logs nothing.
NONCE = struct.pack("<I", 0x50_41_50_49)
HELLO = struct.pack("<BIB", 0, 0x3C_85_F7_CE, 13) + NONCE
# How long a program may accept connections without answering before it counts as another one: a tunnel or a proxy does
# so until the store behind it is there.
MUTE_S = 30.0
LINE_TIMEOUT_S = 1.0
MAX_HEARD_BYTES = 256
MAX_SHOWN = 60

Notify = Callable[[str], None]


def store_server(host: str, port: int, *, is_certain: bool = True) -> dist.TCPStore | None:
    """Hold a store in this process, at a free port if `port` is 0.

    None if the port is taken, unless this host `is_certain` to hold it: another agent of this host may hold the store.

    Raises:
        RendezvousConnectionError: the port is taken.
    """
    try:
        return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, multi_tenant=True)
    except (dist.DistError, RuntimeError, ValueError) as error:
        if is_certain:
            raise RendezvousConnectionError(f"cannot hold a store at port {port}: {error}") from error
        return None


class ForeignListenerError(PapilioError, RendezvousError):
    """What listens where the hosts are to meet is another program."""


@dataclass(frozen=True)
class NoStore:
    """Why there is no store at an address.

    `is_open` means that something accepts connections there, `is_foreign` that it answered and is no store.
    """

    why: str
    is_open: bool = False
    is_foreign: bool = False


@dataclass(frozen=True)
class StoreAddress:
    """Where the store is."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def look(self) -> NoStore | None:
        """Ask what listens there for a number to come back; None for a store, else why it is none."""
        try:
            connection = socket.create_connection((self.host, self.port), CONNECT_TIMEOUT_S)
        except OSError as error:
            if isinstance(error, TimeoutError):
                return NoStore("no answer")
            return NoStore((error.strerror or str(error)).lower())
        with connection:
            return _listen(connection)

    def connect(self) -> dist.TCPStore:
        """Open a connection to the store."""
        timeout = timedelta(seconds=READ_TIMEOUT_S)
        return dist.TCPStore(self.host, self.port, is_master=False, timeout=timeout, wait_for_workers=False)


def _listen(connection: socket.socket) -> NoStore | None:
    """Greet as a store's client does, then as one who wants a line of text, which many servers wait for."""
    heard = b""
    try:
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.sendall(HELLO)
        while len(heard) < len(NONCE):
            received = connection.recv(MAX_HEARD_BYTES)
            if not received:
                break
            heard += received
    except TimeoutError:
        heard += _answer_to_a_line(connection)
        if not heard:
            return NoStore("it takes connections and says nothing", is_open=True)
    except OSError as error:  # closed: what was heard before decides
        logger.debug("what listens there closed the connection: %s", error)
    if heard == NONCE:
        return None
    if not heard:
        return NoStore("it closes every connection", is_open=True)
    text = heard.decode(errors="replace").partition("\n")[0].strip()[:MAX_SHOWN]
    return NoStore(f"it says {text!r}", is_open=True, is_foreign=True)


def _answer_to_a_line(connection: socket.socket) -> bytes:
    try:
        connection.settimeout(LINE_TIMEOUT_S)
        connection.sendall(b"\r\n\r\n")
        return connection.recv(MAX_HEARD_BYTES)
    except OSError:
        return b""


class Backend(C10dRendezvousBackend):
    """The state of the rendezvous in the store."""

    def __init__(self, address: StoreAddress, server: dist.TCPStore | None) -> None:
        """`server` is the store itself, if this process holds it."""
        self.address = address
        self.has_lost_state = False
        self.answered_s = time.monotonic()
        self.unresponsive_before_s = 0.0
        self.outage_reason = ""
        self._server = server
        self._key = ""
        self.mute_s = MUTE_S
        self._no_store: NoStore | None = None
        self._open_since_s: float | None = None
        self._connection: dist.TCPStore | None = None

    def wait_for_store(self, timeout_s: float, notify: Notify) -> None:
        """Return once the store answers.

        Raises:
            RendezvousConnectionError: it does not in time.
            ForeignListenerError: something else answers.
        """
        deadline_s, begin_s, has_notified = time.monotonic() + timeout_s, time.monotonic(), False
        while True:
            with contextlib.suppress(RendezvousConnectionError):
                self.connection()
                return
            now_s = time.monotonic()
            self._refuse_another_program(now_s)
            if now_s > deadline_s:
                raise RendezvousConnectionError(
                    f"the store at {self.address} did not answer for {timeout_s:.0f} s ({self.outage_reason}): is the "
                    "job running on that host, or `papilio rendezvous`, and the port open?"
                )
            if not has_notified and now_s - begin_s > NOTIFY_AFTER_S:
                has_notified = True
                notify(f"waiting up to {timeout_s:.0f} s for the store at {self.address}: {self.outage_reason}")
            time.sleep(RETRY_S)

    def _refuse_another_program(self, now_s: float) -> None:
        """Raise when what listens there is surely no store; one that was known may be suspended, or started anew."""
        no_store = self._no_store
        self._open_since_s = self._open_since_s if no_store is not None and no_store.is_open else None
        if no_store is None or not no_store.is_open:
            return
        self._open_since_s = self._open_since_s or now_s
        is_known = bool(self._key)
        if no_store.is_foreign or (not is_known and now_s - self._open_since_s > self.mute_s):
            raise ForeignListenerError(
                f"what answers at {self.address} is not a Papilio rendezvous ({no_store.why}): another program has "
                "that port. End it, or let all hosts meet at another port (--rdzv-endpoint HOST:PORT; --rdzv_port on a "
                "scheduler)"
            )

    def look_at(self, run_id: str) -> None:
        """Turn to the state of a job."""
        self._key = f"torch.rendezvous.{run_id}"
        self._connection = None

    def connection(self) -> dist.TCPStore:
        """Return a connection that has answered since it was last found unresponsive."""
        if self._connection is None:
            self._no_store = self.address.look()
            if self._no_store is not None:
                self.outage_reason = self._no_store.why
                raise RendezvousConnectionError(f"the store at {self.address} does not answer: {self.outage_reason}")
            self._connection = self._ask(self._open)
        return self._connection

    def _open(self) -> dist.TCPStore:
        store = self.address.connect()
        if not self._key:
            return store
        # The store may have been started anew, and then knows nothing.
        state = store.compare_set(self._key, "", self._NULL_SENTINEL)
        self.has_lost_state = state == self._NULL_SENTINEL.encode()
        return store

    def call(self, operation: str, *arguments: Any) -> Any:
        """Return what the store answers.

        Raises:
            RendezvousConnectionError: it does not.
        """
        return self._ask(partial(getattr(self.connection(), operation), *arguments))

    def _call_store(self, store_op: str, *args: Any, **kwargs: Any) -> Any:
        return self.call(store_op, *args)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Send a request from a thread that may be abandoned: torch's calls have no limit of their own."""
        answers: list[Any] = []
        errors: list[Exception] = []

        def put() -> None:
            try:
                answers.append(question())
            except (dist.DistError, RuntimeError, ValueError) as error:
                errors.append(error)

        thread = Thread(target=put, name="rendezvous", daemon=True)
        thread.start()
        thread.join(ANSWER_TIMEOUT_S)
        if not answers:
            self._connection = None
            self.outage_reason = "the connection broke" if errors else "no answer"
            raise RendezvousConnectionError(f"the store at {self.address} does not answer: {self.outage_reason}")
        now_s = time.monotonic()
        self.unresponsive_before_s, self.answered_s = now_s - self.answered_s, now_s
        return answers[0]
