"""Which option for each table: the least cost within a budget of bytes (the multiple-choice knapsack problem).

Exact: states of the first tables are kept unless another is both smaller and cheaper, or unless even the best that
fractions of the remaining tables could do would end above a solution that is known. Only where more than MAX_STATES
remain, those nearly equal in bytes are thinned, and the result says how far from the optimum it can be.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_STATES = 100_000

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """One option of a table: bytes and what it costs (any unit, not negative)."""

    num_bytes: int
    cost: float


@dataclass(frozen=True)
class Assignment:
    """What was chosen: the place of each table's option, and sums over tables; the optimum is `least_cost` or more."""

    picks: tuple[int, ...]
    num_bytes: int
    cost: float
    least_cost: float


@dataclass(frozen=True)
class _Step:
    """States after a table, by bytes: which state of the table before and which option each came from."""

    parents: NDArray[np.int64]
    options: NDArray[np.int64]


def smallest(tables: Sequence[Sequence[Choice]]) -> int:
    """Return the bytes of the smallest assignment there is."""
    return sum(min(choice.num_bytes for choice in choices) for choices in tables)


def assign(tables: Sequence[Sequence[Choice]], budget_bytes: int, max_states: int = MAX_STATES) -> Assignment | None:
    """Choose one option for each table.

    Returns:
        The assignment of least cost whose bytes are within the budget; None if there is none.
    """
    if smallest(tables) > budget_bytes:
        return None
    # Big tables first: their choices rule out most.
    order = sorted(range(len(tables)), key=lambda table: -max(choice.num_bytes for choice in tables[table]))
    ordered = [tables[table] for table in order]
    bounds = _suffix_bounds(ordered)
    limit = _greedy_cost(ordered, budget_bytes)
    least_cost = float(_bound(bounds[0], np.array([float(budget_bytes)]))[0])
    sizes, costs = np.zeros(1), np.zeros(1)
    steps = []
    for choices, bound in zip(ordered, bounds[1:], strict=True):
        sizes, costs, step = _extend(sizes, costs, choices)
        hopeful = costs + _bound(bound, budget_bytes - sizes) <= limit * (1 + 1e-12) + 1e-300
        kept = _undominated(sizes, costs, np.flatnonzero(hopeful), max_states)
        sizes, costs = sizes[kept], costs[kept]
        steps.append(_Step(step.parents[kept], step.options[kept]))
    best = int(np.argmin(costs))
    picks = _trace(steps, best, order)
    was_thinned = any(len(step.parents) >= max_states for step in steps)
    return _summed(tables, picks, least_cost if was_thinned else float(costs[best]))


def _summed(tables: Sequence[Sequence[Choice]], picks: tuple[int, ...], least_cost: float) -> Assignment:
    chosen = [choices[pick] for choices, pick in zip(tables, picks, strict=True)]
    cost = sum(choice.cost for choice in chosen)
    return Assignment(picks, sum(choice.num_bytes for choice in chosen), cost, min(cost, least_cost))


def _extend(sizes: Doubles, costs: Doubles, choices: Sequence[Choice]) -> tuple[Doubles, Doubles, _Step]:
    added_bytes = np.array([float(choice.num_bytes) for choice in choices])
    added_costs = np.array([choice.cost for choice in choices])
    step = _Step(np.repeat(np.arange(len(sizes)), len(choices)), np.tile(np.arange(len(choices)), len(sizes)))
    return (
        (sizes[:, None] + added_bytes).ravel(),
        (costs[:, None] + added_costs).ravel(),
        step,
    )


def _undominated(sizes: Doubles, costs: Doubles, among: NDArray[np.int64], max_states: int) -> NDArray[np.int64]:
    """Return the states, by bytes, that are cheaper than all smaller ones; thinned to `max_states`."""
    ordered = among[np.lexsort((costs[among], sizes[among]))]
    ordered_costs = costs[ordered]
    before = np.concatenate([[np.inf], np.minimum.accumulate(ordered_costs)[:-1]])
    kept = ordered[ordered_costs < before]
    if len(kept) <= max_states:
        return kept
    # The last of each bin of bytes is its cheapest; the smallest state of all stays, so that there is always a way on.
    spread = (sizes[kept] - sizes[kept[0]]) / max(1.0, sizes[kept[-1]] - sizes[kept[0]])
    bins = (spread * (max_states - 2)).astype(np.int64)
    is_last = np.append(bins[1:] != bins[:-1], True)
    is_last[0] = True
    return np.asarray(kept[is_last])


def _trace(steps: Sequence[_Step], state: int, order: Sequence[int]) -> tuple[int, ...]:
    picks = [0] * len(order)
    for step, table in zip(reversed(steps), reversed(order), strict=True):
        picks[table] = int(step.options[state])
        state = int(step.parents[state])
    return tuple(picks)


def lower_hull(choices: Sequence[Choice]) -> list[int]:
    """Return the options on the lower convex hull of cost over bytes, from the smallest to the cheapest."""
    order = sorted(range(len(choices)), key=lambda place: (choices[place].num_bytes, choices[place].cost))
    hull: list[int] = []
    for place in order:
        if hull and choices[place].cost >= choices[hull[-1]].cost:
            continue
        while len(hull) >= 2 and _slope(choices, hull[-2], hull[-1]) >= _slope(choices, hull[-2], place):
            hull.pop()
        hull.append(place)
    return hull


def _slope(choices: Sequence[Choice], first: int, second: int) -> float:
    """Cost saved by a byte more, as a negative number."""
    more_bytes = choices[second].num_bytes - choices[first].num_bytes
    return (choices[second].cost - choices[first].cost) / max(more_bytes, 1e-9)


def _upgrades(choices: Sequence[Choice]) -> list[tuple[float, float, float]]:
    """Steps along the hull: (slope, bytes, cost), steepest first."""
    return [
        (
            _slope(choices, first, second),
            float(choices[second].num_bytes - choices[first].num_bytes),
            choices[second].cost - choices[first].cost,
        )
        for first, second in itertools.pairwise(lower_hull(choices))
    ]


def _suffix_bounds(tables: Sequence[Sequence[Choice]]) -> list[tuple[Doubles, Doubles]]:
    """For each number of tables done, the least cost of the rest as a convex function of bytes, fractions allowed."""
    bounds = [(np.zeros(1), np.zeros(1))]
    upgrades: list[tuple[float, float, float]] = []
    base_bytes = base_cost = 0.0
    for choices in reversed(tables):
        first = choices[lower_hull(choices)[0]]
        base_bytes, base_cost = base_bytes + first.num_bytes, base_cost + first.cost
        upgrades = sorted([*upgrades, *_upgrades(choices)])
        sizes = base_bytes + np.cumsum([0.0, *(step[1] for step in upgrades)])
        costs = base_cost + np.cumsum([0.0, *(step[2] for step in upgrades)])
        bounds.append((sizes, costs))
    return bounds[::-1]


def _bound(bound: tuple[Doubles, Doubles], room: Doubles) -> Doubles:
    sizes, costs = bound
    # A hair is taken off, so that rounding never rules out the optimum.
    least = np.interp(room, sizes, costs) - 1e-12 * abs(costs[0])
    return np.where(room < sizes[0], np.inf, np.maximum(least, 0.0))


def _greedy_cost(tables: Sequence[Sequence[Choice]], budget_bytes: int) -> float:
    """Cost of an assignment that fits: upgrades by cost saved per byte, each taken where it still fits."""
    hulls = [lower_hull(choices) for choices in tables]
    places = [0] * len(tables)
    room = budget_bytes - sum(choices[hull[0]].num_bytes for choices, hull in zip(tables, hulls, strict=True))
    steps = sorted(
        (_slope(choices, first, second), table, place)
        for table, (choices, hull) in enumerate(zip(tables, hulls, strict=True))
        for place, (first, second) in enumerate(itertools.pairwise(hull))
    )
    for _, table, place in steps:
        choices, hull = tables[table], hulls[table]
        more_bytes = choices[hull[place + 1]].num_bytes - choices[hull[place]].num_bytes
        if places[table] == place and more_bytes <= room:
            places[table] += 1
            room -= more_bytes
    return sum(choices[hull[place]].cost for choices, hull, place in zip(tables, hulls, places, strict=True))
