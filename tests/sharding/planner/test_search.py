"""The search against exhaustive enumeration, and what it must never do."""

import itertools
import random

import numpy as np
import pytest

from papilio.sharding.planner.options import Span
from papilio.sharding.planner.placement import PlacementCandidate
from papilio.sharding.planner.search import Problem, SearchFailure, Solution, replace_one, search


def whole(seconds, device_bytes=0.0, host_bytes=0.0):
    return PlacementCandidate(Span.RANK, 1, seconds, device_bytes, host_bytes, num_shards=1)


def on_every_rank(seconds, num_ranks, device_bytes=0.0):
    return PlacementCandidate(Span.EACH_RANK, 1, seconds, device_bytes, 0.0, num_shards=num_ranks)


def make_problem(choices, num_ranks=3, ranks_per_host=None, device=np.inf, host=np.inf, allowed=None):
    masks = [None] * len(choices)
    for item, ranks in (allowed or {}).items():
        masks[item] = np.isin(np.arange(num_ranks), ranks)
    return Problem(choices, masks, num_ranks, ranks_per_host or num_ranks, device, host)


def best_by_enumeration(problem):
    """The lowest highest load over every pick and every rank of each item, in plain loops."""
    ways = []
    for item, choices in enumerate(problem.choices):
        found = []
        for choice in choices:
            if choice.span is Span.EACH_RANK:
                found.append((choice, tuple(range(problem.num_ranks))))
            else:
                sets = itertools.combinations(range(problem.num_ranks), choice.num_blocks)
                mask = problem.allowed[item]
                found += [(choice, ranks) for ranks in sets if mask is None or all(mask[rank] for rank in ranks)]
        ways.append(found)
    best = np.inf
    for plan in itertools.product(*ways):
        seconds, free = [0.0] * problem.num_ranks, [problem.device_limit_bytes] * problem.num_ranks
        for choice, ranks in plan:
            for rank in ranks:
                seconds[rank] += choice.seconds
                free[rank] -= choice.device_bytes
        if min(free) >= 0:
            best = min(best, max(seconds))
    return best


def random_problem(seed):
    draw = random.Random(seed)
    choices = []
    for _ in range(5):
        work, size = draw.uniform(1, 10), draw.uniform(1, 10)
        halves = PlacementCandidate(Span.RANK, 2, 0.55 * work, size / 2, 0.0, num_shards=2)
        choices.append([whole(work, size), halves, on_every_rank(0.45 * work, 3, size / 3)])
    return make_problem(choices, device=draw.uniform(9, 20))


@pytest.mark.parametrize("seed", range(30))
def test_it_comes_within_five_percent_of_the_best_of_all_plans(seed):
    problem = random_problem(seed)
    optimum = best_by_enumeration(problem)
    found = search(problem)
    if np.isinf(optimum):
        assert isinstance(found, SearchFailure)
    else:
        assert isinstance(found, Solution)
        assert found.loads.seconds.max() <= 1.05 * optimum + 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_the_loads_are_those_of_the_placement_and_memory_is_never_exceeded(seed):
    problem = random_problem(seed)
    found = search(problem)
    if isinstance(found, Solution):
        seconds, free = np.zeros(3), np.full(3, problem.device_limit_bytes)
        for choices, pick, ranks in zip(problem.choices, found.picks, found.ranks, strict=True):
            assert len(set(ranks.tolist())) == choices[pick].num_shards, "shards of a table go to different ranks"
            seconds[ranks] += choices[pick].seconds
            free[ranks] -= choices[pick].device_bytes
        np.testing.assert_allclose(found.loads.seconds, seconds)
        np.testing.assert_allclose(found.loads.device_free, free)
        assert free.min() >= -1e-9


def test_equal_tables_are_spread_evenly():
    found = search(make_problem([[whole(1.0)]] * 12, num_ranks=4))
    assert found.loads.seconds.tolist() == [3.0] * 4


def test_it_swaps_where_no_single_move_helps():
    # In descending order 3, 3, 2, 2, 2 go 3+2+2 and 3+2; the optimum is 3+3 and 2+2+2.
    found = search(make_problem([[whole(float(s))] for s in (3, 3, 2, 2, 2)], num_ranks=2))
    assert found.loads.seconds.max() == 6.0


def test_a_mask_keeps_an_item_to_its_ranks():
    found = search(make_problem([[whole(5.0)], [whole(5.0)], [whole(1.0)]], allowed={0: [1], 1: [1]}))
    assert [found.ranks[0].tolist(), found.ranks[1].tolist()] == [[1], [1]]


def test_host_shards_take_every_rank_of_one_host():
    host = PlacementCandidate(Span.HOST, 1, 1.0, 0.0, 0.0, num_shards=2)
    found = search(make_problem([[host], [host], [host]], num_ranks=6, ranks_per_host=2))
    assert sorted(ranks.tolist() for ranks in found.ranks) == [[0, 1], [2, 3], [4, 5]]


def test_columns_on_one_host_stay_on_it():
    columns = PlacementCandidate(Span.RANKS_OF_HOST, 2, 1.0, 0.0, 0.0, num_shards=2)
    found = search(make_problem([[columns]] * 4, num_ranks=4, ranks_per_host=2))
    assert all(len({rank // 2 for rank in ranks.tolist()}) == 1 for ranks in found.ranks)
    assert found.loads.seconds.tolist() == [2.0] * 4


def test_host_memory_is_shared_by_the_ranks_of_a_host():
    problem = make_problem([[whole(1.0, host_bytes=6.0)]] * 3, num_ranks=4, ranks_per_host=2, host=10.0)
    found = search(problem)
    assert isinstance(found, SearchFailure)
    assert len(found.items) == 1, "two hosts of 10 bytes hold one item of 6 each"
    assert isinstance(search(make_problem([[whole(1.0, host_bytes=5.0)]] * 4, 4, 2, host=10.0)), Solution)


def test_what_does_not_fit_is_named():
    found = search(make_problem([[whole(1.0, 4.0)], [whole(1.0, 11.0)]], device=10.0))
    assert found == SearchFailure((1,))


def test_the_same_problem_gives_the_same_plan():
    first, second = search(random_problem(7)), search(random_problem(7))
    assert first.picks == second.picks
    assert all(np.array_equal(a, b) for a, b in zip(first.ranks, second.ranks, strict=True))


def test_a_forced_choice_is_kept_and_the_others_make_room():
    problem = make_problem([[whole(4.0), on_every_rank(9.0, 2)], [whole(3.0)], [whole(1.0)]], num_ranks=2)
    free = search(problem)
    assert free.picks[0] == 0
    forced = replace_one(problem, free, item=0, pick=1)
    assert forced.picks == (1, 0, 0)
    assert forced.loads.seconds.max() == 12.0


def test_a_forced_choice_that_does_not_fit_gives_none():
    problem = make_problem([[whole(1.0, 1.0), whole(1.0, 99.0)]], device=10.0)
    assert replace_one(problem, search(problem), item=0, pick=1) is None


def test_what_an_option_costs_everywhere_counts():
    cheap_on_one = PlacementCandidate(Span.RANK, 1, 1.0, 0.0, 0.0, 1, everywhere_seconds=5.0)
    found = search(make_problem([[cheap_on_one, whole(3.0)]]))
    assert found.picks == (1,)
