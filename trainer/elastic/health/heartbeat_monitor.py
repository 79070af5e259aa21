"""Ranks that give no more heartbeats while another waits for them: their host lost its power or its network.

Nothing else tells of that: no connection is closed, and what waits at it goes on waiting. A rank that trains never
asks; one that waits looks at the others' signs every few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from papilio.trainer.elastic.health.health_store import HealthStore, Sign

# So long without a sign, and nothing will come; a cable that is plugged in again, or a switch that reboots, takes less.
LOST_AFTER_S = 60.0
LOOK_EVERY_S = 5.0
STORE = -1


class SilenceWatch:
    """What one rank knows of the others' silence, by its own clock."""

    def __init__(self, channel: HealthStore, world_size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._channel = channel
        self._world_size = world_size
        self._clock = clock
        self._looked_s = clock()
        self._heard: dict[int, tuple[int, float]] = {}
        self._signs: dict[int, Sign] = {}

    def lost(self, idle_s: float) -> str | None:
        """Look, if it is time to; say who has been silent for too long, or None.

        Args:
            idle_s: how long nothing has moved on this rank.
        """
        now_s = self._clock()
        if self._world_size == 1 or idle_s < LOST_AFTER_S / 6:
            self._heard.clear()
            return None
        if now_s - self._looked_s < min(LOOK_EVERY_S, LOST_AFTER_S / 6):
            return None
        self._looked_s = now_s
        self._listen(now_s)
        silent = [who for who, (_, since_s) in sorted(self._heard.items()) if now_s - since_s > LOST_AFTER_S]
        return self._tell(silent) if silent and idle_s > LOST_AFTER_S else None

    def culprit(self) -> tuple[int, str] | None:
        """Return the silent rank that `lost` named first and its host; None where it was the store."""
        silent = min(self._heard, key=lambda who: (self._heard[who][1], who), default=STORE)
        return None if silent == STORE else (silent, self._host(silent))

    def _listen(self, now_s: float) -> None:
        signs = self._channel.signs(self._world_size)
        if not self._channel.is_answering:
            self._heard = {STORE: self._heard.get(STORE, (0, now_s))}  # of the ranks nothing is known then
            return
        self._heard.pop(STORE, None)
        self._signs = {**self._signs, **signs}
        for rank in range(self._world_size):
            count = signs[rank].count if rank in signs else 0
            if rank in signs and signs[rank].has_left:
                self._heard.pop(rank, None)
            elif self._heard.get(rank, (-1, 0.0))[0] != count:
                self._heard[rank] = count, now_s

    def _tell(self, silent: list[int]) -> str:
        if silent == [STORE]:
            return f"the store has not answered for {LOST_AFTER_S:g} s: its host is gone, or this one's network"
        names = ", ".join(f"rank {rank} (host {self._host(rank)})" for rank in silent)
        has = "has" if len(silent) == 1 else "have"
        return f"{names} {has} given no heartbeat for {LOST_AFTER_S:g} s: the host or its network is gone"

    def _host(self, rank: int) -> str:
        return self._signs[rank].host if rank in self._signs else "unknown"
