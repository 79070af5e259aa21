"""A store beside the process group, through which ranks learn of each other when collectives no longer work.

Each rank writes its heartbeat there, and the first failure of the job is noted once, by the rank that failed or by
the agent that found it dead. Nothing here is collective, and a store that does not answer counts as empty.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from threading import Thread
from typing import TypeVar

import torch.distributed as dist

from papilio.trainer.elastic.health.heartbeat import Heartbeat

# A store on a host that vanished answers nothing, not even an error.
ANSWER_TIMEOUT_S = 3.0
FAILURE_KEY = "first_failure"
NO_RESTART_KEY = "no_restart"

T = TypeVar("T")


@dataclass(frozen=True)
class RankFailure:
    """The first failure of a job: which rank, where, at which step (-1: the error says), and one line of why."""

    rank: int
    host: str
    step: int
    error: str
    unix_s: float

    def __str__(self) -> str:
        at_step = f", at step {self.step:,}" if self.step >= 0 else ""
        return f"rank {self.rank} (host {self.host}) failed first{at_step}: {self.error}"


class HealthStore:
    """The heartbeats and the first failure of one round of a job, in a store; without a store it holds nothing.

    Any method may be called from any thread. When the store fails to answer, a question is answered with nothing, and
    `is_answering` is False until it answers again.
    """

    def __init__(self, store: dist.Store | None) -> None:
        self._store = store
        self.is_answering = store is not None

    def publish(self, heartbeat: Heartbeat) -> None:
        """Write a rank's heartbeat, in place of its last."""
        self._ask(lambda store: store.set(_heartbeat_key(heartbeat.rank), heartbeat.to_json()), None)

    def heartbeats(self, world_size: int) -> dict[int, Heartbeat]:
        """Return the latest heartbeat of every rank that ever gave one."""

        def read(store: dist.Store) -> dict[int, Heartbeat]:
            known = list(range(world_size))
            if not store.check([_heartbeat_key(rank) for rank in known]):  # one question, where all are there
                known = [rank for rank in known if store.check([_heartbeat_key(rank)])]
            found = store.multi_get([_heartbeat_key(rank) for rank in known]) if known else []
            return {rank: Heartbeat.from_json(value) for rank, value in zip(known, found, strict=True)}

        return self._ask(read, {})

    def note_failure(self, failure: RankFailure) -> RankFailure:
        """Note a failure unless one has been noted before; return the one that is stored."""
        text = json.dumps(asdict(failure))
        stored = self._ask(lambda store: store.compare_set(FAILURE_KEY, "", text), text.encode())
        return RankFailure(**json.loads(stored))

    def first_failure(self) -> RankFailure | None:
        """Return the failure that was noted first, if any was."""

        def read(store: dist.Store) -> RankFailure | None:
            return RankFailure(**json.loads(store.get(FAILURE_KEY))) if store.check([FAILURE_KEY]) else None

        return self._ask(read, None)

    def forbid_restart(self) -> None:
        """Tell all agents that the failure would repeat, so that none restarts the job."""
        self._ask(lambda store: store.set(NO_RESTART_KEY, "1"), None)

    def is_restart_forbidden(self) -> bool:
        """Return whether any agent has called `forbid_restart`."""
        return self._ask(lambda store: store.check([NO_RESTART_KEY]), False)

    def purge(self, world_size: int) -> None:
        """Delete what an earlier round may have written under the same name."""

        def delete(store: dist.Store) -> None:
            for key in (FAILURE_KEY, NO_RESTART_KEY, *(_heartbeat_key(rank) for rank in range(world_size))):
                store.delete_key(key)

        self._ask(delete, None)

    def _ask(self, question: Callable[[dist.Store], T], default: T) -> T:
        """Put a question to the store in a thread that may be left behind, and wait for the answer a few seconds."""
        store = self._store
        if store is None:
            return default
        answers: list[T] = []

        def put() -> None:
            with contextlib.suppress(dist.DistError, RuntimeError, ValueError):  # the store is gone, or cut off
                answers.append(question(store))

        thread = Thread(target=put, name="health_store", daemon=True)
        thread.start()
        thread.join(ANSWER_TIMEOUT_S)
        self.is_answering = bool(answers)
        return answers[0] if answers else default


def open_health_store(environment: Mapping[str, str] = os.environ) -> HealthStore:
    """Reach the store of the job that torchrun's variables describe; without them, or if
    it does not answer, one that holds nothing.

    Under our agent that is the store of the rendezvous, which lives in the first agent and outlives the ranks. Under
    plain torchrun it is the one of the process group, which may live in rank 0.
    """
    address = environment.get("PET_RDZV_ENDPOINT", "")
    has_agent = bool(address) and not address.endswith(":0")
    if not has_agent:
        address = f"{environment.get('MASTER_ADDR', '')}:{environment.get('MASTER_PORT', '')}"
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "TORCHELASTIC_RUN_ID" not in environment:
        return HealthStore(None)
    try:
        store = dist.TCPStore(host.strip("[]"), int(port), is_master=False, timeout=timedelta(seconds=ANSWER_TIMEOUT_S))
    except (dist.DistError, RuntimeError, ValueError):
        return HealthStore(None)
    attempt = "" if has_agent else environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = round_prefix(
        environment["TORCHELASTIC_RUN_ID"], environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    )
    return HealthStore(dist.PrefixStore(f"{prefix}/{attempt}", store))


def round_prefix(run_id: str, master_address: str, master_port: int) -> str:
    """Name one round of a job: every round's process group meets at a port of its own."""
    return f"papilio/{run_id}/{master_address}:{master_port}"


def host_name() -> str:
    """Return this host's name, as messages show it."""
    return socket.gethostname()


def _heartbeat_key(rank: int) -> str:
    return f"heartbeat/{rank}"
