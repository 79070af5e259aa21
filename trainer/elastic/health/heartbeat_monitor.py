"""Ranks whose heartbeats stop while another waits for them: their host lost its power or its network.

Nothing else shows that: no connection is closed, and what waits on one keeps waiting. A rank that trains never
asks; one that waits reads the others' heartbeats every few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from papilio.trainer.elastic.health.health_store import HealthStore
from papilio.trainer.elastic.health.heartbeat import Heartbeat

# So long without a heartbeat, a rank is lost; plugging a cable in again, or rebooting a switch, takes less.
LOST_AFTER_S = 60.0
LOOK_EVERY_S = 5.0
STORE = -1


class HeartbeatMonitor:
    """When one rank last saw the others' heartbeats, by its own clock."""

    def __init__(self, health_store: HealthStore, world_size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._health_store = health_store
        self._world_size = world_size
        self._clock = clock
        self._read_s = clock()
        self._changed: dict[int, tuple[int, float]] = {}
        self._heartbeats: dict[int, Heartbeat] = {}

    def lost(self, idle_s: float) -> str | None:
        """Read the heartbeats, if it is time to; describe who has been unresponsive for too long, or None.

        Args:
            idle_s: how long nothing has moved on this rank.
        """
        now_s = self._clock()
        if self._world_size == 1 or idle_s < LOST_AFTER_S / 6:
            self._changed.clear()
            return None
        if now_s - self._read_s < min(LOOK_EVERY_S, LOST_AFTER_S / 6):
            return None
        self._read_s = now_s
        self._read(now_s)
        lost = [who for who, (_, since_s) in sorted(self._changed.items()) if now_s - since_s > LOST_AFTER_S]
        return self._describe(lost) if lost and idle_s > LOST_AFTER_S else None

    def culprit(self) -> tuple[int, str] | None:
        """Return the unresponsive rank that `lost` named first and its host; None where it was the store."""
        first = min(self._changed, key=lambda who: (self._changed[who][1], who), default=STORE)
        return None if first == STORE else (first, self._host(first))

    def _read(self, now_s: float) -> None:
        heartbeats = self._health_store.heartbeats(self._world_size)
        if not self._health_store.is_answering:
            self._changed = {STORE: self._changed.get(STORE, (0, now_s))}  # of the ranks nothing is known then
            return
        self._changed.pop(STORE, None)
        self._heartbeats = {**self._heartbeats, **heartbeats}
        for rank in range(self._world_size):
            count = heartbeats[rank].count if rank in heartbeats else 0
            if rank in heartbeats and heartbeats[rank].has_left:
                self._changed.pop(rank, None)
            elif self._changed.get(rank, (-1, 0.0))[0] != count:
                self._changed[rank] = count, now_s

    def _describe(self, lost: list[int]) -> str:
        if lost == [STORE]:
            return f"the store has not answered for {LOST_AFTER_S:g} s: its host is gone, or this one's network"
        names = ", ".join(f"rank {rank} (host {self._host(rank)})" for rank in lost)
        has = "has" if len(lost) == 1 else "have"
        return f"{names} {has} given no heartbeat for {LOST_AFTER_S:g} s: the host or its network is gone"

    def _host(self, rank: int) -> str:
        return self._heartbeats[rank].host if rank in self._heartbeats else "unknown"
