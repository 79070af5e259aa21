"""The least cost within a budget, against all there is."""

import itertools
import random

import pytest

from papilio.trainer.inference.export.assignment import Choice, assign, lower_hull, smallest


def random_tables(seed):
    source = random.Random(seed)

    def choice():
        return Choice(source.randint(1, 50), source.random() if source.random() < 0.8 else 0.0)

    tables = [[choice() for _ in range(source.randint(1, 5))] for _ in range(source.randint(1, 6))]
    largest = sum(max(choice.num_bytes for choice in choices) for choices in tables)
    return tables, source.randint(smallest(tables) - 2, largest)


def least_cost(tables, budget):
    fitting = (
        sum(choice.cost for choice in picked)
        for picked in itertools.product(*tables)
        if sum(choice.num_bytes for choice in picked) <= budget
    )
    return min(fitting, default=None)


@pytest.mark.parametrize("seed", range(60))
def test_the_assignment_is_the_best_of_all(seed):
    tables, budget = random_tables(seed)
    found, expected = assign(tables, budget), least_cost(tables, budget)
    if expected is None:
        assert found is None
        return
    picked = [choices[pick] for choices, pick in zip(tables, found.picks, strict=True)]
    assert found.num_bytes == sum(choice.num_bytes for choice in picked) <= budget
    assert found.cost == pytest.approx(sum(choice.cost for choice in picked), abs=1e-12)
    assert found.cost == pytest.approx(expected, abs=1e-12)
    assert found.least_cost == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_a_thinned_search_says_how_far_off_it_can_be(seed):
    tables, budget = random_tables(seed)
    found, expected = assign(tables, budget, max_states=8), least_cost(tables, budget)
    if expected is not None:
        assert found.num_bytes <= budget
        assert found.least_cost - 1e-9 <= expected <= found.cost + 1e-9


def test_a_thousand_tables_are_near_the_bound():
    source = random.Random(0)
    tables = []
    for _ in range(1_000):
        rows, weight = int(10 ** source.uniform(2, 7)), 10 ** source.uniform(-6, -3)
        errors = ((64, 0.0), (32, 1e-6), (20, 1e-4), (12, 1e-2), (8, 0.2))
        tables.append([Choice(rows * size, weight * error * source.uniform(0.5, 2)) for size, error in errors])
    budget = int(0.2 * sum(choices[0].num_bytes for choices in tables))
    found = assign(tables, budget, max_states=2_000)
    assert found.num_bytes <= budget
    assert found.cost <= found.least_cost * 1.001


def test_the_hull_leaves_out_what_is_never_worth_its_bytes():
    # The third costs more than the line from the second to the fourth; the fifth is larger and no cheaper.
    choices = [Choice(1, 10.0), Choice(2, 4.0), Choice(3, 3.9), Choice(4, 1.0), Choice(5, 1.0)]
    assert lower_hull(choices) == [0, 1, 3]
