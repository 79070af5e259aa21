"""Who is found slow from figures alone, and when it is told."""

import random
import statistics

import pytest

from papilio.trainer.elastic.health.heartbeat import RankFigures
from papilio.trainer.elastic.health.stragglers import (
    MIN_TIMED,
    NUM_WINDOWS,
    WINDOW_S,
    RankState,
    StragglerDetector,
    _others_median,
)

STEP_S = 0.020


class Job:
    """Ranks of eight to a host whose figures go on window by window."""

    def __init__(self, num_ranks):
        self.detector = StragglerDetector()
        self.num_ranks = num_ranks
        self.num_windows = 0
        self.wait_s = [0.0] * num_ranks

    def window(self, dense_ms=4.0, lookup_ms=2.0, wait_share=0.0, steps=100):
        """Go on for one window; return the news. A list has a value for each rank."""
        dense, lookups, waits = (
            value if isinstance(value, list) else [value] * self.num_ranks
            for value in (dense_ms, lookup_ms, wait_share)
        )
        self.num_windows += 1
        train_s = self.num_windows * steps * STEP_S
        states = {}
        for rank in range(self.num_ranks):
            self.wait_s[rank] += waits[rank] * steps * STEP_S
            tables = (("t_C3", 0.61), ("t_C17", 0.2))
            timed = self.num_windows * MIN_TIMED
            figures = RankFigures(train_s, self.wait_s[rank], timed, lookups[rank], dense[rank], tables)
            states[rank] = RankState(f"n{rank // 8}", self.num_windows * steps, figures)
        return self.detector.look(states, self.num_windows * WINDOW_S)

    def windows(self, count, **figures):
        return [line for _ in range(count) for line in self.window(**figures)]


def slow(num_ranks, ranks, times, usual=4.0):
    return [usual * times if rank in ranks else usual for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [2, 3, 8, 512])
def test_a_straggler_is_told_once_after_some_windows_and_once_when_it_is_over(num_ranks):
    job = Job(num_ranks)
    assert job.windows(NUM_WINDOWS, dense_ms=slow(num_ranks, {1}, 2.1)) == [], "the first window has no one before it"
    assert job.window(dense_ms=slow(num_ranks, {1}, 2.1)) == [
        "rank 1 (host n0) computes its dense layers 2.1 times as slowly as the others (8.4 ms against 4.0 ms), and "
        "everyone waits; look there for other processes, clocks, temperature"
    ]
    assert job.windows(5, dense_ms=slow(num_ranks, {1}, 1.4)) == [], "between the thresholds nothing changes"
    assert [alert.ranks for alert in job.detector.alerts] == [(1,)]
    assert job.windows(NUM_WINDOWS - 1) == []
    assert job.window() == ["rank 1 (host n0) is as fast as the others again"]
    assert job.detector.alerts == ()


def test_a_slow_host_is_told_as_one():
    job = Job(32)
    (line,) = job.windows(NUM_WINDOWS + 1, dense_ms=slow(32, set(range(8, 16)), 1.8))
    assert line.startswith("ranks 8-15 (host n1) compute their dense layers 1.8 times as slowly as the others")


def test_a_rank_with_more_lookups_is_told_with_its_tables():
    job = Job(4)
    (line,) = job.windows(NUM_WINDOWS + 1, lookup_ms=slow(4, {2}, 1.9, usual=2.0))
    assert line == (
        "rank 2 (host n0) takes 1.9 times as long as the others for its lookups (3.8 ms against 2.0 ms), and everyone "
        "waits; most bytes are read from t_C3 (61%), t_C17 (20%); `papilio calibrate` and plan anew, or give "
        "sharding.constraints"
    )


def test_a_slow_host_is_not_taken_for_one_with_too_many_lookups():
    job = Job(4)
    job.windows(6, dense_ms=slow(4, {2}, 2.0), lookup_ms=slow(4, {2}, 2.0, usual=2.0))
    assert [alert.kind for alert in job.detector.alerts] == ["dense"]


def test_only_one_rank_with_tables_has_all_the_lookups():
    job = Job(2)
    (line,) = job.windows(NUM_WINDOWS + 1, lookup_ms=[2.0, 0.0])
    assert line.startswith("rank 0 (host n0) takes all the time for its lookups (2.0 ms against 0.0 ms)")


def test_late_data_of_one_rank_and_of_all():
    job = Job(4)
    (line,) = job.windows(NUM_WINDOWS + 1, wait_share=[0.01, 0.01, 0.34, 0.01])
    assert line == (
        "rank 2 (host n0) waits 34% of the time for data, the others 1%, and everyone waits with that; look at the "
        "storage and the cores there"
    )
    job = Job(2)
    (line,) = job.windows(NUM_WINDOWS + 1, wait_share=[0.01, 0.8])
    assert line.startswith("rank 1 (host n0) waits 80% of the time for data, the others 1%"), "and not: all ranks wait"
    job = Job(4)
    (line,) = job.windows(NUM_WINDOWS + 1, wait_share=0.4)
    assert line.startswith("all ranks wait for data, 40% of the time: ")
    assert job.windows(NUM_WINDOWS) == ["data comes in time again"]


@pytest.mark.parametrize(
    "figures",
    [
        {"dense_ms": slow(4, {1}, 1.4)},
        {"dense_ms": slow(4, {1}, 3.0, usual=0.1)},  # of a step of 20 ms nobody feels it
        {"lookup_ms": slow(4, {1}, 5.0, usual=0.1)},
        {"wait_share": [0.05, 0.13, 0.05, 0.05]},
        {"dense_ms": slow(4, {1}, 2.0), "steps": 0},  # the job evaluates or saves
    ],
)
def test_what_is_not_worth_a_word(figures):
    assert Job(4).windows(20, **figures) == []


def test_one_rank_alone_is_slower_than_nobody():
    assert Job(1).windows(10) == []


def test_noise_that_hits_now_this_rank_and_now_that_one_is_no_alert():
    generator = random.Random(3)
    for num_ranks in (2, 4):
        job = Job(num_ranks)
        for _ in range(2_000):
            assert job.window(dense_ms=slow(num_ranks, {generator.randrange(20)}, 2.0)) == []


def test_a_rank_without_figures_yet_is_waited_for():
    job = Job(2)
    figures = RankFigures(1.0, 0.0)
    assert job.detector.look({0: RankState("a", 1, figures), 1: RankState("a", 1, figures)}, 0.0) == []
    assert job.detector.look({0: RankState("a", 2, figures)}, WINDOW_S) == []


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8])
def test_the_median_of_the_others(size):
    generator = random.Random(size)
    values = [generator.choice([1.0, 2.0, 2.0, generator.random()]) for _ in range(size)]
    expected = [statistics.median(values[:place] + values[place + 1 :]) for place in range(size)]
    assert _others_median(values) == pytest.approx(expected)
