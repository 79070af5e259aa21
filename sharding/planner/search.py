"""Which option for each table, and on which ranks: greedy with the sizes in mind, then local improvement.

The aim is the smallest load of the most loaded rank, in seconds, within every rank's memory. The search is a pure
function of its inputs and is bounded by counts, not by time, so every rank and every machine finds the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from papilio.sharding.planner.options import Span
from papilio.sharding.planner.placement import Loads, PlacementCandidate

# Items looked at on the most loaded rank before the search gives up, and rounds of improvement over the whole search.
MAX_ITEMS_PER_ROUND = 64
MAX_ROUNDS = 2_000
# Of the attempts that placed everything, so many are improved further, by placing pairs of items anew together.
NUM_POLISHED = 3
MAX_PAIRS = 1_000
# Where fewer orders than this work out, memory is tight, and all are tried again with memory first.
MIN_FILLED = 3
# Orders drawn at random beside the natural ones, so many that about this number of items is placed in them.
ITEMS_IN_RANDOM_ORDERS = 1_000
MAX_RANDOM_ORDERS = 40


@dataclass(frozen=True)
class Problem:
    """Choices of each item, and which ranks [W] may hold it (None: all)."""

    choices: Sequence[Sequence[PlacementCandidate]]
    allowed: Sequence[NDArray[np.bool_] | None]
    num_ranks: int
    ranks_per_host: int
    device_limit_bytes: float
    host_limit_bytes: float


@dataclass(frozen=True)
class Solution:
    """For each item the number of its choice and the ranks of its shards."""

    picks: tuple[int, ...]
    ranks: tuple[NDArray[np.int64], ...]
    loads: Loads


@dataclass(frozen=True)
class SearchFailure:
    """The items that found no place, in the order in which they were tried, by the attempt that placed the most."""

    items: tuple[int, ...]


def search(problem: Problem) -> Solution | SearchFailure:
    """Return the best placement found, or which items did not fit."""
    orders = _orders(problem)
    failed: list[int] | None = None
    filled: list[_Attempt] = []
    for saves_memory in (False, True):
        for order in orders:
            attempt = _Attempt(problem, saves_memory=saves_memory)
            unplaced = attempt.fill(order)
            if unplaced:
                failed = unplaced if failed is None or len(unplaced) < len(failed) else failed
                continue
            attempt.improve()
            filled.append(attempt)
        if len(filled) >= MIN_FILLED:
            break
    if filled:
        best = sorted(filled, key=_Attempt.value)[:NUM_POLISHED]
        for attempt in best:
            attempt.improve(in_pairs=True)
        return min(best, key=_Attempt.value).solution()
    assert failed is not None
    return SearchFailure(tuple(failed))


def replace_one(problem: Problem, solution: Solution, item: int, pick: int) -> Solution | None:
    """Force an item's choice in a solution and let all others move to make room; None where that does not fit."""
    attempt = _Attempt(problem)
    attempt.forced[item] = pick
    order = [item, *np.argsort([-s for s in _sizes(problem)], kind="stable").tolist()]
    picks = dict(enumerate(solution.picks))
    for other in dict.fromkeys(order):
        if not attempt.place(other, [pick if other == item else picks[other]]) and not attempt.place(other):
            return None
    attempt.improve()
    return attempt.solution()


def _sizes(problem: Problem) -> list[float]:
    """Seconds of each item's largest necessary shard: that of the choice with the least work."""
    return [min(choices, key=lambda c: c.mean_seconds(problem.num_ranks)).seconds for choices in problem.choices]


def _orders(problem: Problem) -> list[list[int]]:
    """Orders in which to place the items: by time, by memory, by the larger share of either, and shaken ones."""
    seconds = np.array(_sizes(problem))
    memory = np.array([min(c.device_bytes * c.num_shards for c in choices) for choices in problem.choices])
    keys = [seconds, memory, np.maximum(seconds / max(seconds.max(), 1e-30), memory / max(memory.max(), 1e-30))]
    generator = np.random.default_rng(0)
    for _ in range(min(MAX_RANDOM_ORDERS, ITEMS_IN_RANDOM_ORDERS // len(seconds))):
        keys.append(keys[2] * generator.uniform(0.3, 1.0, len(seconds)))
    return [np.argsort(-key, kind="stable").tolist() for key in keys]


class _Attempt:
    """A placement in the making."""

    def __init__(self, problem: Problem, *, saves_memory: bool = False) -> None:
        self._saves_memory = saves_memory
        self.forced: dict[int, int] = {}
        self._num_pairs = 0
        self._is_full = False
        self._problem = problem
        self._loads = Loads(
            problem.num_ranks, problem.ranks_per_host, problem.device_limit_bytes, problem.host_limit_bytes
        )
        count = len(problem.choices)
        self._picks: list[int] = [-1] * count
        self._ranks: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * count
        # What the loads come to if all work is the least possible and spreads evenly: no plan gets below it.
        self._level = sum(
            min(choice.mean_seconds(problem.num_ranks) for choice in choices) for choices in problem.choices
        )

    def value(self) -> tuple[float, float]:
        """What is minimized: the highest load, then the sum of all."""
        return float(self._loads.seconds.max()) + self._loads.everywhere_seconds, float(self._loads.seconds.sum())

    def solution(self) -> Solution:
        return Solution(tuple(self._picks), tuple(self._ranks), self._loads)

    def fill(self, order: Sequence[int]) -> list[int]:
        """Place all items in this order and return those that did not fit."""
        unplaced = [item for item in order if not self.place(item)]
        self._is_full = not unplaced
        return unplaced

    def place(self, item: int, picks: Sequence[int] | None = None) -> bool:
        """Place an item where it does least harm; `picks` are the choices to consider (default: all)."""
        best: tuple[float, int, NDArray[np.int64]] | None = None
        choices = self._problem.choices[item]
        if item in self.forced:
            picks = [self.forced[item]]
        for pick in picks if picks is not None else range(len(choices)):
            choice = choices[pick]
            ranks = self._loads.find(choice, self._problem.allowed[item])
            if ranks is None:
                continue
            harm = self._harm(choice, ranks)
            if best is None or harm < best[0] * (1 - 1e-12):
                best = (harm, pick, ranks)
        if best is None:
            return False
        self._put(item, best[1], best[2])
        return True

    def _harm(self, choice: PlacementCandidate, ranks: NDArray[np.int64]) -> float:
        if self._saves_memory and not self._is_full:
            used = self._problem.device_limit_bytes - float(self._loads.device_free[ranks].min())
            return used + choice.device_bytes + choice.device_bytes * choice.num_shards / self._problem.num_ranks
        # A shard that stays below the level costs only its work; above it, it makes the whole step longer.
        peak = max(float(self._loads.seconds[ranks].max()) + choice.seconds, self._level)
        return peak + choice.mean_seconds(self._problem.num_ranks)

    def improve(self, *, in_pairs: bool = False) -> None:
        """Move, re-cut or swap items of the most loaded rank for as long as that lowers the highest load."""
        for _ in range(MAX_ROUNDS):
            rank = int(self._loads.seconds.argmax())
            here = [item for item in range(len(self._picks)) if rank in self._ranks[item]]
            here.sort(key=lambda item: -self._choice(item).seconds)
            here = here[:MAX_ITEMS_PER_ROUND]
            if any(self._move(item) or self._swap(item, rank) for item in here):
                continue
            if not in_pairs or not any(
                self._move(item, other) for item in here for other in range(len(self._picks)) if other != item
            ):
                return

    def _move(self, *items: int) -> bool:
        """Place one or two items anew, in this order, if that lowers the highest load."""
        if len(items) > 1:
            self._num_pairs += 1
            if self._num_pairs > MAX_PAIRS:
                return False
        before = self.value()
        places = [(item, self._picks[item], self._ranks[item]) for item in items]
        self._level = float(self._loads.seconds.max()) * (1 - 1e-9)
        for item in items:
            self._take(item)
        placed = [item for item in items if self.place(item)]
        if len(placed) == len(items) and self.value()[0] < before[0] * (1 - 1e-9):
            return True
        for item in placed:
            self._take(item)
        for place in places:
            self._put(*place)
        return False

    def _swap(self, item: int, rank: int) -> bool:
        """Exchange a whole table of the most loaded rank with a smaller one of another."""
        mine = self._choice(item)
        if mine.span is not Span.RANK or mine.num_blocks > 1:
            return False
        highest = float(self._loads.seconds[rank])
        for other, choice in self._whole_elsewhere(rank):
            there = int(self._ranks[other][0])
            gain = mine.seconds - choice.seconds
            if gain <= highest * 1e-9 or float(self._loads.seconds[there]) + gain >= highest * (1 - 1e-9):
                continue
            if self._may_hold(item, there, mine, choice) and self._may_hold(other, rank, choice, mine):
                self._exchange(item, other, rank, there)
                return True
        return False

    def _whole_elsewhere(self, rank: int) -> list[tuple[int, PlacementCandidate]]:
        found = []
        for other in range(len(self._picks)):
            choice = self._choice(other)
            if choice.span is Span.RANK and choice.num_blocks == 1 and self._ranks[other][0] != rank:
                found.append((other, choice))
        return sorted(found, key=lambda pair: float(self._loads.seconds[self._ranks[pair[0]][0]]) - pair[1].seconds)

    def _may_hold(self, item: int, rank: int, choice: PlacementCandidate, leaving: PlacementCandidate) -> bool:
        allowed = self._problem.allowed[item]
        if allowed is not None and not allowed[rank]:
            return False
        if choice.host_bytes or leaving.host_bytes:
            return False  # host memory is shared; moves alone deal with it
        return bool(self._loads.device_free[rank] + leaving.device_bytes >= choice.device_bytes)

    def _exchange(self, item: int, other: int, rank: int, there: int) -> None:
        pick, other_pick = self._picks[item], self._picks[other]
        self._take(item)
        self._take(other)
        self._put(item, pick, np.array([there]))
        self._put(other, other_pick, np.array([rank]))

    def _choice(self, item: int) -> PlacementCandidate:
        return self._problem.choices[item][self._picks[item]]

    def _put(self, item: int, pick: int, ranks: NDArray[np.int64]) -> None:
        self._picks[item], self._ranks[item] = pick, ranks
        self._loads.add(self._problem.choices[item][pick], ranks)

    def _take(self, item: int) -> None:
        self._loads.add(self._choice(item), self._ranks[item], sign=-1)
        self._picks[item] = -1
