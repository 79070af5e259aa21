"""Loads of ranks and where the next shard goes: the arithmetic of the search, on arrays over ranks.

W ranks of a group, H hosts, L ranks of a host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from papilio.sharding.planner.options import Span

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PlacementCandidate:
    """An option of an item as the search sees it: figures only.

    `num_blocks` shards (for Span.HOST: column blocks, each a shard on every rank of a host) that each cost their rank
    `seconds` and hold `device_bytes` of the device's and `host_bytes` of its host's memory. `everywhere_seconds` is
    what the item costs every rank besides.
    """

    span: Span
    num_blocks: int
    seconds: float
    device_bytes: float
    host_bytes: float
    num_shards: int
    everywhere_seconds: float = 0.0

    def mean_seconds(self, num_ranks: int) -> float:
        """Over the ranks."""
        return self.seconds * self.num_shards / num_ranks + self.everywhere_seconds


class Loads:
    """Seconds and bytes that the shards placed so far put on each rank, and what is still free."""

    def __init__(self, num_ranks: int, ranks_per_host: int, device_limit_bytes: float, host_limit_bytes: float) -> None:
        self.seconds: Floats = np.zeros(num_ranks)
        self.everywhere_seconds = 0.0
        self.device_free: Floats = np.full(num_ranks, device_limit_bytes)
        self.host_free: Floats = np.full(num_ranks // ranks_per_host, host_limit_bytes)
        self._ranks_per_host = ranks_per_host
        self._host_of = np.arange(num_ranks) // ranks_per_host

    def find(self, choice: PlacementCandidate, allowed: NDArray[np.bool_] | None) -> NDArray[np.int64] | None:
        """Return the least loaded ranks where the choice fits, [num_shards]; None where it does not fit."""
        if choice.span is Span.EACH_RANK:
            return self._every_rank(choice)
        fits = self.device_free >= choice.device_bytes
        if choice.host_bytes:
            fits &= self.host_free[self._host_of] >= choice.host_bytes
        if allowed is not None:
            fits &= allowed
        open_seconds = np.where(fits, self.seconds, np.inf)
        if choice.span is Span.RANK:
            return self._ranks(choice, open_seconds)
        by_host = open_seconds.reshape(-1, self._ranks_per_host)
        if choice.span is Span.HOST:
            return self._whole_hosts(choice, by_host)
        return self._ranks_of_one_host(choice, by_host)

    def add(self, choice: PlacementCandidate, ranks: NDArray[np.int64], sign: int = 1) -> None:
        """Put the choice's shards on `ranks`, or with sign -1 take them off."""
        self.seconds[ranks] += sign * choice.seconds
        self.everywhere_seconds += sign * choice.everywhere_seconds
        self.device_free[ranks] -= sign * choice.device_bytes
        if choice.host_bytes:
            np.subtract.at(self.host_free, self._host_of[ranks], sign * choice.host_bytes)

    def _every_rank(self, choice: PlacementCandidate) -> NDArray[np.int64] | None:
        if self.device_free.min() < choice.device_bytes:
            return None
        if choice.host_bytes and self.host_free.min() < choice.host_bytes * self._ranks_per_host:
            return None
        return np.arange(len(self.seconds))

    def _ranks(self, choice: PlacementCandidate, open_seconds: Floats) -> NDArray[np.int64] | None:
        if choice.num_blocks == 1:
            rank = int(open_seconds.argmin())
            return None if np.isinf(open_seconds[rank]) else np.array([rank])
        if choice.num_blocks > len(open_seconds):
            return None
        ranks = np.argsort(open_seconds, kind="stable")[: choice.num_blocks]
        if np.isinf(open_seconds[ranks[-1]]):
            return None
        if choice.host_bytes:
            needed = np.bincount(self._host_of[ranks], minlength=len(self.host_free)) * choice.host_bytes
            if (needed > self.host_free).any():
                return None
        return ranks

    def _whole_hosts(self, choice: PlacementCandidate, by_host: Floats) -> NDArray[np.int64] | None:
        worst = by_host.max(axis=1)
        if choice.host_bytes:
            worst = np.where(self.host_free >= choice.host_bytes * self._ranks_per_host, worst, np.inf)
        if choice.num_blocks > len(worst):
            return None
        hosts = np.argsort(worst, kind="stable")[: choice.num_blocks]
        if np.isinf(worst[hosts[-1]]):
            return None
        return (hosts[:, None] * self._ranks_per_host + np.arange(self._ranks_per_host)).ravel()

    def _ranks_of_one_host(self, choice: PlacementCandidate, by_host: Floats) -> NDArray[np.int64] | None:
        if choice.num_blocks > self._ranks_per_host:
            return None
        order = np.argsort(by_host, axis=1, kind="stable")[:, : choice.num_blocks]
        worst = np.take_along_axis(by_host, order[:, -1:], axis=1)[:, 0]
        if choice.host_bytes:
            worst = np.where(self.host_free >= choice.host_bytes * choice.num_blocks, worst, np.inf)
        host = int(worst.argmin())
        if np.isinf(worst[host]):
            return None
        ranks: NDArray[np.int64] = host * self._ranks_per_host + order[host]
        return ranks
