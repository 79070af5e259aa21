"""Where the agents of a job meet: torch's c10d rendezvous, whose store may be silent for a while.

Torch's own ends an agent, or lets it hang, as soon as the store does not answer. Here every question to the store has a
limit and, after a silence, a new connection; ranks that are well go on meanwhile. A host that was silent itself takes
its place again, or joins anew if the others went on without it.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from threading import Thread, Timer
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousSettings,
    RendezvousTimeout,
    _BackendRendezvousStateHolder,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig

from trainer.addresses import is_loopback, is_own_address, own_address_towards

# How long a question to the store may take. On a loaded host threads come late.
ANSWER_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 3.0
RETRY_S = 0.5
# For what agents write for each other right after they met.
READ_TIMEOUT_S = 60
# How long an agent without ranks waits for a store that it has known.
STORE_TIMEOUT_S = 30
JOIN_TIMEOUT_S = 600
LAST_CALL_TIMEOUT_S = 30
KEEP_ALIVE_INTERVAL_S = 5
KEEP_ALIVE_ATTEMPTS = 3
TELL_AFTER_S = 3.0

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Times:
    """How long this host waits, in seconds, at a rendezvous."""

    join: int
    last_call: int
    store: int
    keep_alive_interval: int
    keep_alive_attempts: int

    @property
    def silence(self) -> int:
        """After which a host counts as gone."""
        return self.keep_alive_interval * self.keep_alive_attempts


def open_rendezvous(config: LaunchConfig, tell: Tell) -> Rendezvous:
    """Reach the store of the job, or hold it where the endpoint is this host's, and return the place to meet.

    With the port 0 the store is held here, for a job of one host.

    Raises:
        RendezvousError: the store is not reached in time.
    """
    settings = config.rdzv_configs
    times = Times(
        join=int(settings.get("join_timeout", JOIN_TIMEOUT_S)),
        last_call=int(settings.get("last_call_timeout", LAST_CALL_TIMEOUT_S)),
        store=int(settings.get("store_timeout", STORE_TIMEOUT_S)),
        keep_alive_interval=int(settings.get("keep_alive_interval", KEEP_ALIVE_INTERVAL_S)),
        keep_alive_attempts=int(settings.get("keep_alive_max_attempt", KEEP_ALIVE_ATTEMPTS)),
    )
    is_host = settings.get("is_host")
    host, port = parse_rendezvous_endpoint(config.rdzv_endpoint, default_port=29400)
    server = hold_store(host, port, is_certain=is_host is not None) if _holds(host, is_host) else None
    address = StoreAddress(host, server.port if server is not None else port)
    run_id = config.run_id
    for attempt in count(1):
        backend = Backend(address, config.run_id, server)
        backend.wait_for_store(times.join, tell)
        rendezvous = Rendezvous.at(backend, config, times, config.local_addr or _own_address(address), tell)
        # A store that outlives its jobs knows this name from one that has ended.
        if not rendezvous.is_closed():
            break
        config.run_id = f"{run_id}.{attempt}"
    return rendezvous


def _holds(host: str, is_host: Any) -> bool:
    return is_own_address(host) if is_host is None else str(is_host).lower() in ("1", "true", "t", "yes", "y")


def _own_address(store: StoreAddress) -> str | None:
    """The address at which other hosts find this one; None for torch's choice, the name."""
    address = own_address_towards(store.host, store.port)
    return None if address is None or is_loopback(address) else address


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

    def __init__(self, address: StoreAddress, run_id: str, server: dist.TCPStore | None) -> None:
        """`server` is the store itself, if this process holds it."""
        self.address = address
        self.has_lost_state = False
        self.heard_s = time.monotonic()
        self.silence_before_s = 0.0
        self.why_silent = ""
        self._server = server
        self._key = f"torch.rendezvous.{run_id}"
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

    def connection(self) -> dist.TCPStore:
        """Return a connection that has answered since it was last found silent."""
        if self._connection is None:
            self.why_silent = self.address.why_silent()
            if self.why_silent:
                raise RendezvousConnectionError(f"the store at {self.address} does not answer: {self.why_silent}")
            self._connection = self.ask(self._open)
        return self._connection

    def _open(self) -> dist.TCPStore:
        store = self.address.connect()
        # The store may have been started anew, and then knows nothing.
        state = store.compare_set(self._key, "", self._NULL_SENTINEL)
        self.has_lost_state = state == self._NULL_SENTINEL.encode()
        return store

    def _call_store(self, store_op: str, *args: Any, **kwargs: Any) -> Any:
        store = self.connection()
        return self.ask(lambda: getattr(store, store_op)(*args, **kwargs))

    def ask(self, question: Callable[[], Any]) -> Any:
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


class _State(_BackendRendezvousStateHolder):
    """The state as this host knows it."""

    _lenient_until_s = 0.0

    def _sanitize(self) -> None:
        """Strike off the hosts that were silent; but who was cut off itself first gives the others time to speak."""
        window_s = (self._settings.keep_alive_interval * self._settings.keep_alive_max_attempt).total_seconds()
        now_s = time.monotonic()
        assert isinstance(self._backend, Backend)
        if self._backend.silence_before_s > window_s:
            self._lenient_until_s = now_s + window_s
        if now_s > self._lenient_until_s:
            super()._sanitize()


class Rendezvous(DynamicRendezvousHandler):
    """Brings the agents of a job together, round after round; see the module for what is different from torch's."""

    _backend: Backend
    _times: Times
    _tell: Tell
    _names: dict[int, str]
    _round = -1
    _rank = -1
    _size = 0
    _has_told = False
    _missing: frozenset[str] = frozenset()

    @classmethod
    def at(cls, backend: Backend, config: LaunchConfig, times: Times, address: str | None, tell: Tell) -> Rendezvous:
        """Return this host's place in the job; `address` is where other hosts find it."""
        settings = RendezvousSettings(
            run_id=config.run_id,
            min_nodes=config.min_nodes,
            max_nodes=config.max_nodes,
            timeout=RendezvousTimeout(timedelta(seconds=times.join), timedelta(seconds=times.last_call)),
            keep_alive_interval=timedelta(seconds=times.keep_alive_interval),
            keep_alive_max_attempt=times.keep_alive_attempts,
        )
        node = cls._node_desc_generator.generate(address)
        made = cls(node, settings, backend.name, backend.connection(), _State(backend, settings))
        made._backend, made._times, made._tell, made._names = backend, times, tell, {}
        return made

    @property
    def endpoint(self) -> str:
        """Where the store is."""
        return str(self._backend.address)

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other hosts; a store that does not answer is waited for.

        Raises:
            RendezvousError: the job was ended, or too few hosts came in time, or the store did not come back.
        """
        told = Timer(TELL_AFTER_S + self._times.last_call, self._tell_who_waits)
        told.daemon = True
        told.start()
        deadline_s = time.monotonic() + self._times.store
        try:
            while True:
                try:
                    return self._meet()
                except RendezvousTimeoutError:
                    here = len(self._state_holder.state.participants)
                    raise RendezvousTimeoutError(
                        f"{here} of {self.settings.min_nodes} hosts came to {self.endpoint} within "
                        f"{self._times.join} s; the same command must run on each of them"
                    ) from None
                except (RendezvousConnectionError, dist.DistError):
                    self._backend.wait_for_store(max(0.0, deadline_s - time.monotonic()), self._tell)
                    if time.monotonic() > deadline_s:
                        raise
        finally:
            told.cancel()

    def _meet(self) -> RendezvousInfo:
        self._store = self._backend.connection()
        info = super().next_rendezvous()
        self._round, self._rank, self._size = self._state_holder.state.round, info.rank, info.world_size
        self._backend.has_lost_state, self._missing, self._names = False, frozenset(), {}
        info.store.set(_name_key(info.rank), socket.gethostname())
        return info

    def num_nodes_waiting(self) -> int:
        """Return for how many hosts, this one included, the ranks must start again; 0 while the store is silent."""
        try:
            with self._heartbeat_lock:
                self._state_holder.sync()
                self._take_place_again()
                self._learn_names()
                state = self._state_holder.state
                has_moved_on = self._backend.has_lost_state or state.round != self._round
                waiting = len(state.wait_list) or int(has_moved_on)
        except RendezvousConnectionError:
            if not self._has_told and time.monotonic() - self._backend.heard_s > TELL_AFTER_S:
                self._has_told = True
                self._tell(
                    f"the store at {self.endpoint} does not answer ({self._backend.why_silent}); the ranks go on"
                )
            return 0
        if self._has_told:
            self._tell(f"the store at {self.endpoint} answers again")
        self._has_told = False
        if not has_moved_on:
            self._tell_who_is_missing()
        return waiting

    def _take_place_again(self) -> None:
        """Write this host into the state again, from which others struck it off while it was silent."""
        state = self._state_holder.state
        if state.complete and state.round == self._round and self._this_node not in state.participants:
            state.participants[self._this_node] = self._rank
            state.last_heartbeats[self._this_node] = datetime.now(UTC)
            self._state_holder.mark_dirty()
            self._state_holder.sync()

    def _learn_names(self) -> None:
        """Ask once for the names of the other hosts, while they are there."""
        if len(self._names) == self._size:
            return
        store = self._wrap_store(self._backend.connection())
        for rank in set(range(self._size)) - self._names.keys():
            key = _name_key(rank)
            if self._backend.ask(partial(store.check, [key])):
                self._names[rank] = self._backend.ask(partial(store.get, key)).decode()

    def _tell_who_is_missing(self) -> None:
        """Name hosts that have fallen silent since the last time, and those that speak again."""
        present = set(self._state_holder.state.participants.values())
        missing = frozenset(self._names.get(rank, "unknown") for rank in range(self._size) if rank not in present)
        for name in sorted(missing - self._missing):
            self._tell(f"host {name} has given no sign of life for {self._times.silence} s; the ranks wait for it")
        for name in sorted(self._missing - missing):
            self._tell(f"host {name} is there again")
        self._missing = missing

    def _tell_who_waits(self) -> None:
        state = self._state_holder.state
        here = len(state.participants)
        if not state.complete and here < self.settings.min_nodes:
            self._tell(
                f"waiting up to {self._times.join} s for other hosts: {here} of {self.settings.min_nodes} are at "
                f"{self.endpoint}"
            )


def _name_key(rank: int) -> str:
    return f"papilio/host/{rank}"
