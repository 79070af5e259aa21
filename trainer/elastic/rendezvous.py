"""Where the agents of a job meet: torch's c10d rendezvous, which tolerates outages of the store.

Torch's own ends an agent, or lets it hang, as soon as the store does not answer. Here every request to the store has a
limit and, after an outage, a new connection; healthy ranks continue meanwhile. A host that was cut off itself takes its
place again, or joins anew if the others continued without it.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from threading import Timer
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousSettings,
    RendezvousTimeout,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig

from papilio.trainer.compat.torch_elastic_internals import BackendRendezvousStateHolder
from papilio.trainer.elastic.addresses import is_loopback, is_own_address, own_address_towards
from papilio.trainer.elastic.store import NOTIFY_AFTER_S, Backend, Notify, StoreAddress, store_server

# How long an agent without ranks waits for a store that it has known.
STORE_TIMEOUT_S = 30
JOIN_TIMEOUT_S = 600
LAST_CALL_TIMEOUT_S = 30
KEEP_ALIVE_INTERVAL_S = 5
KEEP_ALIVE_ATTEMPTS = 3
# After which a host that has taken a job's name has come to the rendezvous.
LOOK_AGAIN_S = 2.0


@dataclass(frozen=True)
class Times:
    """How long this host waits, in seconds, at a rendezvous."""

    join: int
    last_call: int
    store: int
    keep_alive_interval: int
    keep_alive_attempts: int

    @property
    def lost_after(self) -> int:
        """After which a host counts as gone."""
        return self.keep_alive_interval * self.keep_alive_attempts


class OtherJobError(RendezvousError):
    """At the store another job runs under this one's name, or the hosts were started with different words."""


def open_rendezvous(config: LaunchConfig, words: Sequence[str], notify: Notify) -> Rendezvous:
    """Reach the store of the job, or hold it where the endpoint is this host's, and return the place to meet.

    With the port 0 the store is held here, for a job of one host. `words` start a rank, on all hosts the same.

    Raises:
        RendezvousError: the store is not reached in time, or the job there is another one.
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
    server = store_server(host, port, is_certain=is_host is not None) if _holds(host, is_host) else None
    address = StoreAddress(host, server.port if server is not None else port)
    backend = Backend(address, server)
    backend.wait_for_store(times.join, notify)
    own = config.local_addr or _own_address(address)

    def meet(run_id: str) -> Rendezvous:
        return Rendezvous.at(backend, run_id, (config.min_nodes, config.max_nodes), times, own, notify)

    # A store that outlives its jobs may know this name from one that has ended.
    names = (f"{config.run_id}.{attempt}" if attempt else config.run_id for attempt in count())
    rendezvous = next(met for met in map(meet, names) if not met.is_closed())
    rendezvous.check_same_job(words)
    return rendezvous


def _holds(host: str, is_host: Any) -> bool:
    return is_own_address(host) if is_host is None else str(is_host).lower() in ("1", "true", "t", "yes", "y")


def _own_address(store: StoreAddress) -> str | None:
    """The address at which other hosts find this one; None for torch's choice, the name."""
    address = own_address_towards(store.host, store.port)
    return None if address is None or is_loopback(address) else address


class _State(BackendRendezvousStateHolder):
    """The state as this host knows it."""

    _lenient_until_s = 0.0

    def _sanitize(self) -> None:
        """Remove unresponsive hosts; but one that was cut off itself first gives the others time to send heartbeats."""
        window_s = (self._settings.keep_alive_interval * self._settings.keep_alive_max_attempt).total_seconds()
        now_s = time.monotonic()
        assert isinstance(self._backend, Backend)
        if self._backend.unresponsive_before_s > window_s:
            self._lenient_until_s = now_s + window_s
        if now_s > self._lenient_until_s:
            super()._sanitize()


class Rendezvous(DynamicRendezvousHandler):
    """Brings the agents of a job together, round after round; see the module for what is different from torch's."""

    _backend: Backend
    _times: Times
    _notify: Notify
    _names: dict[int, str]
    _round = -1
    _rank = -1
    _size = 0
    _has_notified = False
    # Whether the others have continued without this host, so that its ranks wait for nothing.
    is_left_behind = False
    _missing: frozenset[str] = frozenset()

    @classmethod
    def at(
        cls, backend: Backend, run_id: str, nodes: tuple[int, int], times: Times, address: str | None, notify: Notify
    ) -> Rendezvous:
        """Return this host's place in a job of so many hosts, at least and at most.

        `address` is where other hosts find this one.
        """
        settings = RendezvousSettings(
            run_id=run_id,
            min_nodes=nodes[0],
            max_nodes=nodes[1],
            timeout=RendezvousTimeout(timedelta(seconds=times.join), timedelta(seconds=times.last_call)),
            keep_alive_interval=timedelta(seconds=times.keep_alive_interval),
            keep_alive_max_attempt=times.keep_alive_attempts,
        )
        backend.look_at(run_id)
        node = cls._node_desc_generator.generate(address)
        made = cls(node, settings, backend.name, backend.connection(), _State(backend, settings))
        made._backend, made._times, made._notify, made._names = backend, times, notify, {}
        return made

    @property
    def endpoint(self) -> str:
        """Where the store is."""
        return str(self._backend.address)

    def check_same_job(self, words: Sequence[str]) -> None:
        """Check that the hosts that are there were started with the same words.

        Raises:
            OtherJobError: they were not.
        """
        key = f"papilio/{self.get_run_id()}/job"
        mine = json.dumps({"host": socket.gethostname(), "words": list(words)})
        there = self._write_first(key, "", mine)
        if there["words"] != list(words) and not self._has_hosts():
            time.sleep(LOOK_AGAIN_S)
            if not self._has_hosts():  # what is stored is of an earlier job
                there = self._write_first(key, json.dumps(there), mine)
        if there["words"] != list(words):
            raise OtherJobError(
                f"at {self.endpoint}, host {there['host']} runs a job with other settings: "
                f"{_only_in(there['words'], words)} there, {_only_in(words, there['words'])} here; start the same "
                "command on all hosts, or name this job with --rdzv-id"
            )

    def _write_first(self, key: str, expected: str, value: str) -> dict[str, Any]:
        stored: dict[str, Any] = json.loads(self._backend.call("compare_set", key, expected, value))
        return stored

    def _has_hosts(self) -> bool:
        self._state_holder.sync()
        return bool(self._state_holder.state.last_heartbeats)

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other hosts; a store that does not answer is waited for.

        Raises:
            RendezvousError: the job was ended, or too few hosts came in time, or the store did not come back.
        """
        notice = Timer(NOTIFY_AFTER_S + self._times.last_call, self._notify_waiting)
        notice.daemon = True
        notice.start()
        deadline_s = time.monotonic() + self._times.store
        try:
            while True:
                try:
                    return self._meet()
                except RendezvousTimeoutError:
                    raise RendezvousTimeoutError(
                        f"fewer than {self.settings.min_nodes} hosts came to {self.endpoint} within "
                        f"{self._times.join} s; the same command must run on each of them"
                    ) from None
                except (RendezvousConnectionError, dist.DistError):
                    self._backend.wait_for_store(max(0.0, deadline_s - time.monotonic()), self._notify)
                    if time.monotonic() > deadline_s:
                        raise
        finally:
            notice.cancel()

    def _meet(self) -> RendezvousInfo:
        self._store = self._backend.connection()
        info = super().next_rendezvous()
        self._round, self._rank, self._size = self._state_holder.state.round, info.rank, info.world_size
        self._backend.has_lost_state, self._missing, self._names = False, frozenset(), {}
        info.store.set(_name_key(info.rank), socket.gethostname())
        return info

    def num_nodes_waiting(self) -> int:
        """Return for how many hosts, this one included, the ranks must restart; 0 while the store does not answer."""
        try:
            with self._heartbeat_lock:
                self._state_holder.sync()
                self._take_place_again()
                self._learn_names()
                state = self._state_holder.state
                self.is_left_behind = state.round != self._round and not self._backend.has_lost_state
                has_moved_on = self._backend.has_lost_state or self.is_left_behind
                waiting = len(state.wait_list) or int(has_moved_on)
        except RendezvousConnectionError:
            if not self._has_notified and time.monotonic() - self._backend.answered_s > NOTIFY_AFTER_S:
                self._has_notified = True
                self._notify(
                    f"the store at {self.endpoint} does not answer ({self._backend.outage_reason}); the ranks continue"
                )
            return 0
        if self._has_notified:
            self._notify(f"the store at {self.endpoint} answers again")
        self._has_notified = False
        if self.is_left_behind:
            self._notify("the other hosts continued without this one; its ranks end, and it joins anew")
        elif has_moved_on:
            self._notify(f"the store at {self.endpoint} is a new one; the ranks save, and the hosts join anew")
        else:
            self._notify_missing()
        return waiting

    def _take_place_again(self) -> None:
        """Write this host into the state again, from which others removed it while it was cut off."""
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
        for rank in set(range(self._size)) - self._names.keys():
            key = f"{self._prefix()}/{_name_key(rank)}"
            if self._backend.call("check", [key]):
                self._names[rank] = self._backend.call("get", key).decode()

    def _prefix(self) -> str:
        return f"torch.rendezvous.{self.get_run_id()}.{self._round}"

    def _notify_missing(self) -> None:
        """Report hosts that have become unresponsive since the last time, and those that are back."""
        present = set(self._state_holder.state.participants.values())
        missing = frozenset(self._names.get(rank, "unknown") for rank in range(self._size) if rank not in present)
        for name in sorted(missing - self._missing):
            self._notify(f"host {name} has given no heartbeat for {self._times.lost_after} s; the ranks wait for it")
        for name in sorted(self._missing - missing):
            self._notify(f"host {name} is there again")
        self._missing = missing

    def _notify_waiting(self) -> None:
        state = self._state_holder.state
        here = len(state.participants)
        if not state.complete and here < self.settings.min_nodes:
            self._notify(
                f"waiting up to {self._times.join} s for other hosts: {here} of {self.settings.min_nodes} are at "
                f"{self.endpoint}"
            )


def _name_key(rank: int) -> str:
    return f"papilio/host/{rank}"


def _only_in(words: Sequence[str], others: Sequence[str]) -> str:
    return " ".join(word for word in words if word not in others) or "nothing more"
