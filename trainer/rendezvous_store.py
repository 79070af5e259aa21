"""The store of a rendezvous, and a connection to it that is replaced when it falls silent."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from threading import Thread
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

# How long a question to the store may take. On a loaded host threads come late.
ANSWER_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 3.0
RETRY_S = 0.5
# For what agents write for each other right after they met.
READ_TIMEOUT_S = 60
TELL_AFTER_S = 3.0

Tell = Callable[[str], None]


def hold_store(host: str, port: int, *, is_certain: bool = True) -> dist.TCPStore | None:
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


@dataclass(frozen=True)
class StoreAddress:
    """Where the store is."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def why_silent(self) -> str:
        """Say why no connection opens; nothing if one does."""
        try:
            with socket.create_connection((self.host, self.port), CONNECT_TIMEOUT_S):
                return ""
        except OSError as error:
            if isinstance(error, TimeoutError):
                return "no answer"
            return (error.strerror or str(error)).lower()

    def connect(self) -> dist.TCPStore:
        """Open a connection to the store."""
        timeout = timedelta(seconds=READ_TIMEOUT_S)
        return dist.TCPStore(self.host, self.port, is_master=False, timeout=timeout, wait_for_workers=False)


class Backend(C10dRendezvousBackend):
    """The state of the rendezvous in the store."""

    def __init__(self, address: StoreAddress, server: dist.TCPStore | None) -> None:
        """`server` is the store itself, if this process holds it."""
        self.address = address
        self.has_lost_state = False
        self.heard_s = time.monotonic()
        self.silence_before_s = 0.0
        self.why_silent = ""
        self._server = server
        self._key = ""
        self._connection: dist.TCPStore | None = None

    def wait_for_store(self, timeout_s: float, tell: Tell) -> None:
        """Return once the store answers.

        Raises:
            RendezvousConnectionError: it does not in time.
        """
        deadline_s, begin_s, has_told = time.monotonic() + timeout_s, time.monotonic(), False
        while True:
            with contextlib.suppress(RendezvousConnectionError):
                self.connection()
                return
            now_s = time.monotonic()
            if now_s > deadline_s:
                raise RendezvousConnectionError(
                    f"the store at {self.address} did not answer for {timeout_s:.0f} s ({self.why_silent}): is the job "
                    "running on that host, or `papilio rendezvous`, and the port open?"
                )
            if not has_told and now_s - begin_s > TELL_AFTER_S:
                has_told = True
                tell(f"waiting up to {timeout_s:.0f} s for the store at {self.address}: {self.why_silent}")
            time.sleep(RETRY_S)

    def look_at(self, run_id: str) -> None:
        """Turn to the state of a job."""
        self._key = f"torch.rendezvous.{run_id}"
        self._connection = None

    def connection(self) -> dist.TCPStore:
        """Return a connection that has answered since it was last found silent."""
        if self._connection is None:
            self.why_silent = self.address.why_silent()
            if self.why_silent:
                raise RendezvousConnectionError(f"the store at {self.address} does not answer: {self.why_silent}")
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
        """Put a question in a thread that may be left behind: torch's have no limit of their own."""
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
            self.why_silent = "the connection broke" if errors else "no answer"
            raise RendezvousConnectionError(f"the store at {self.address} does not answer: {self.why_silent}")
        now_s = time.monotonic()
        self.silence_before_s, self.heard_s = now_s - self.heard_s, now_s
        return answers[0]
