import re
import subprocess
import sys
from pathlib import Path

import pytest

from papilio.trainer.elastic.health.watchdog import describe_ranks, describe_stall, late_ranks
from tests.support.agents import REPOSITORY, AgentProcess
from tests.support.signs import sign_of


def signs(*steps_and_collectives: tuple[int, int], count: int = 1) -> dict:
    return {
        rank: sign_of(rank, step, num_collectives=collectives, count=count)
        for rank, (step, collectives) in enumerate(steps_and_collectives)
    }


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([(9, 70), (9, 70), (9, 70)], []),
        ([(9, 70), (9, 69), (9, 70)], [1]),  # within the same step, before a collective that the others have entered
        ([(9, 70), (9, 70), (8, 66)], [2]),
        ([(9, 70), (8, 66), (7, 60)], [1, 2]),
    ],
)
def test_the_late_ranks_are_those_behind(places: list[tuple[int, int]], expected: list[int]) -> None:
    assert late_ranks(signs(*places), signs(*places, count=3), 3) == expected


def test_a_rank_that_is_silent_gone_or_never_came_is_late_before_all_others() -> None:
    before, after = signs((9, 70), (9, 70), (9, 69)), signs((9, 70), (9, 70), (9, 69), count=3)
    assert late_ranks(before, {**after, 1: before[1]}, 3) == [1]
    assert late_ranks(before, {**after, 0: sign_of(0, 9, count=2, has_left=True)}, 3) == [0]
    assert late_ranks(before, after, 4) == [3]


def test_a_stall_is_told_with_the_last_sign() -> None:
    found = signs((1_234, 70), (1_234, 70), (1_234, 70))
    found[3] = sign_of(3, 1_233, idle_s=61.5, unix_s=1e9 - 0.5)
    assert describe_stall([3], found, found[0], 4, 1e9) == (
        "rank 3 has not arrived at step 1,235: last sign step 1,233 (training), 62 s ago, host host-3; ranks 0-2 wait"
    )
    del found[3]
    assert describe_stall([3], found, found[0], 4, 1e9).startswith(
        "rank 3 has not arrived and never gave a heartbeat; ranks 0-2 wait"
    )


def test_a_stall_without_a_late_rank_is_told_too() -> None:
    found = signs((5, 7), (5, 7))
    assert describe_stall([], found, found[0], 2, 1e9) == "all 2 ranks stand still after step 5 (training)"
    assert describe_stall([0, 1], {}, found[0], 2, 1e9) == (
        "rank 0 stands after step 5 (training); the store with the other ranks' signs does not answer"
    )
    assert describe_stall([0], {}, found[0], 1, 1e9) == "the only rank stands still after step 5 (training)"


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [([3], "rank 3"), ([0, 1, 2], "ranks 0-2"), ([0, 2, 3, 7], "ranks 0, 2-3, 7")],
)
def test_ranks_are_written_as_spans(ranks: list[int], expected: str) -> None:
    assert describe_ranks(ranks) == expected


@pytest.mark.parametrize(
    ("event", "limit", "told"),
    [
        ("sleep", "--stall-timeout-s=6", "rank 1 has not arrived at step 12: last sign step .*; rank 0 waits"),
        (
            "SIGSTOP",
            "--lost-after-s=8",
            r"rank 1 \(host \S+\) has given no heartbeat for 8 s: the host or its network is gone",
        ),
    ],
    ids=["late", "silent"],
)
def test_a_rank_that_does_not_arrive_is_named_and_the_job_starts_again(
    tmp_path: Path, event: str, limit: str, told: str
) -> None:
    agent = AgentProcess(tmp_path, f"--event={event}:1:12", limit, max_restarts=1)
    try:
        assert agent.wait() == 0, agent.output
    finally:
        agent.kill()
    assert re.search(told, agent.output)
    assert "(most recent call last):" in agent.output
    assert "toy begins at step 10 on 2" in agent.output


STANDS_STILL = """
import time
from papilio.trainer.elastic.health.job_health import job_health
from papilio.trainer.process_group import process_group
with process_group() as ranks, job_health(ranks, 0.2) as health:
    health.mark(7, "saving")
    time.sleep(300)
"""


def test_a_single_rank_without_a_store_is_ended_with_its_stack() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STANDS_STILL], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "(train.stall_timeout_s = 0.2): the only rank stands still after step 7 (saving)" in done.stderr
    assert 'File "<string>", line 7, in <module>' in done.stderr


MOVES = """
import time, torch, torch.distributed as dist
from papilio.trainer.elastic.health.job_health import job_health
from papilio.trainer.process_group import process_group
with process_group() as ranks, job_health(ranks, 5.0) as health:
    for second in range(20):
        time.sleep(0.4)
        health.mark(second) if MARKS else dist.all_reduce(torch.zeros(1))
"""


@pytest.mark.parametrize("has_marks", [True, False])
def test_marks_and_collectives_count_as_moves(has_marks: bool) -> None:
    code = MOVES.replace("MARKS", str(has_marks))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
