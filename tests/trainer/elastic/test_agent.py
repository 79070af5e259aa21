"""Agents with real ranks on loopback: exit statuses, restarts, and jobs that shrink."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.agents import AgentProcess, free_port, is_alive, wait_until

RESUME, NO_RESTART = 75, 78


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., AgentProcess]]:
    started: list[AgentProcess] = []

    def begin(*options: str, **settings: object) -> AgentProcess:
        started.append(AgentProcess(tmp_path, *options, **settings))
        return started[-1]

    yield begin
    for agent in started:
        agent.kill()


def step_of(folder: Path) -> int:
    checkpoint = folder / "checkpoint"
    return int(checkpoint.read_text()) if checkpoint.exists() else 0


def test_a_killed_rank_is_named_to_all_and_the_job_goes_on(tmp_path: Path, start: Callable[..., AgentProcess]) -> None:
    agent = start("--event=SIGKILL:1:12", max_restarts=2)
    assert agent.wait() == 0, agent.output
    assert_in_order(
        agent.output,
        "[0]:toy begins at step 0 on 2",
        "[0]:toy: error: rank 1 (host ",
        ") failed first: killed by SIGKILL (by hand, or by the kernel out of memory)",
        "restarting, restart 1 of 2",
        "papilio: starting again on 2 ranks",
        "[0]:toy begins at step 10 on 2",
        "[0]:toy ends at step 40 on 2",
    )
    assert step_of(tmp_path) == 40


@pytest.mark.parametrize(
    ("launcher", "status", "num_starts"),
    [("papilio.trainer.elastic.agent", 1, 2), ("tests.support.forgiving_agent", 0, 3)],
)
def test_restarts_are_counted_unless_the_ranks_ran_for_long(
    start: Callable[..., AgentProcess], launcher: str, status: int, num_starts: int
) -> None:
    agent = start("--event=SIGKILL:1:12", "--times=2", max_restarts=1, launcher=launcher)
    assert agent.wait() == status, agent.output
    assert agent.output.count("toy begins") == num_starts
    assert agent.output.count("restarting, restart 1 of 1") == num_starts - 1


def test_an_error_is_told_once_with_the_rank_that_made_it(start: Callable[..., AgentProcess]) -> None:
    agent = start("--event=raise:1:12")
    assert agent.wait() == 1
    assert "[1]:toy: mistake: this rank fails on purpose\n" in agent.output
    (told_by_rank_0,) = [line for line in agent.output.splitlines() if line.startswith("[0]:toy: error: ")]
    told, _, place = told_by_rank_0.partition(" (support/toy_job.py:")
    assert told.endswith("failed first, at step 11: ValueError: this rank fails on purpose")
    assert place.endswith(", in happen)")
    (told_by_agent,) = [line for line in agent.output.splitlines() if line.startswith("papilio: ")]
    assert told_by_agent == told_by_rank_0.replace("[0]:toy: error: ", "papilio: error: ")
    assert "Traceback" not in agent.output


def test_a_mistake_that_would_be_made_again_is_not_restarted(start: Callable[..., AgentProcess]) -> None:
    agent = start("--event=refuse:0:3", max_restarts=3)
    assert agent.wait() == NO_RESTART
    assert agent.output.count("toy begins") == 1
    assert f"papilio: error: rank 0 (host {os.uname().nodename}) failed first, at step 2: Refusal" in agent.output


@pytest.mark.parametrize("mistaken", [0, 1])
def test_the_agents_of_all_hosts_say_that_a_mistake_would_be_made_again(
    start: Callable[..., AgentProcess], mistaken: int
) -> None:
    port = free_port()
    event = f"--event=refuse:{mistaken}:3"
    one = start(event, nproc=1, nnodes="2", port=port, max_restarts=3)
    other = start(event, nproc=1, nnodes="2", port=port, is_host=False, max_restarts=3)
    assert (one.wait(), other.wait()) == (NO_RESTART, NO_RESTART), one.output + other.output
    assert (one.output + other.output).count("toy begins") == 1
    for agent in (one, other):
        assert f"papilio: error: rank {mistaken} (host {os.uname().nodename}) failed first, at step 2" in agent.output


@pytest.mark.parametrize("goes_to", ["agent", "rank"])
def test_sigterm_saves_and_leaves_with_status_75(
    tmp_path: Path, start: Callable[..., AgentProcess], goes_to: str
) -> None:
    agent = start("--steps=100000", max_restarts=3)
    wait_until(lambda: step_of(tmp_path) > 0, "steps")
    os.kill(agent.process.pid if goes_to == "agent" else agent.rank_pids()[1], signal.SIGTERM)
    assert agent.wait() == RESUME, agent.output
    step = step_of(tmp_path)
    assert f"[0]:saved at {step}\n" in agent.output
    assert f"[1]:saved at {step}\n" in agent.output
    assert agent.output.endswith("papilio: all ranks saved and left; start the job again to resume\n")


def test_ranks_that_do_not_save_in_time_are_ended(tmp_path: Path, start: Callable[..., AgentProcess]) -> None:
    agent = start("--steps=100000", "--save-s=1000", grace_s=1)
    wait_until(lambda: step_of(tmp_path) > 0, "steps")
    pids = agent.rank_pids()
    agent.process.send_signal(signal.SIGTERM)
    assert agent.wait() == 128 + signal.SIGTERM
    assert "papilio: asked to stop by SIGTERM; all ranks were ended, without saving" in agent.output
    assert not any(map(is_alive, pids))


def test_ranks_end_when_their_agent_is_gone(tmp_path: Path, start: Callable[..., AgentProcess]) -> None:
    agent = start("--steps=100000")
    wait_until(lambda: step_of(tmp_path) > 0, "steps")
    pids = agent.rank_pids()
    assert len(pids) == 2
    agent.process.kill()
    wait_until(lambda: not any(map(is_alive, pids)), "the end of the ranks")


def test_an_elastic_job_goes_on_without_a_host_that_is_lost(tmp_path: Path, start: Callable[..., AgentProcess]) -> None:
    port = free_port()
    one = start("--steps=400", nproc=1, nnodes="1:2", port=port, max_restarts=3)
    other = start("--steps=400", nproc=1, nnodes="1:2", port=port, is_host=False, max_restarts=3)
    wait_until(lambda: step_of(tmp_path) > 0, "steps")
    other.kill()
    assert one.wait() == 0, one.output
    assert_in_order(
        one.output,
        "[0]:toy begins at step 0 on 2",
        "went away without reporting an error after step ",
        ": killed, or its host is gone; restarting, restart 1 of 3",
        "papilio: starting again on 1 rank",
        " on 1",
        "[0]:toy ends at step 400 on 1",
    )


def test_a_host_that_is_taken_leaves_and_one_that_comes_joins(
    tmp_path: Path, start: Callable[..., AgentProcess]
) -> None:
    port = free_port()
    one = start("--steps=100000", nproc=1, nnodes="1:2", port=port)
    taken = start("--steps=100000", nproc=1, nnodes="1:2", port=port, is_host=False)
    wait_until(lambda: step_of(tmp_path) > 0, "steps")
    taken.process.send_signal(signal.SIGTERM)
    assert taken.wait() == RESUME, taken.output
    left_at = step_of(tmp_path)
    wait_until(lambda: f"toy begins at step {left_at} on 1" in one.output, "the rank that is left")
    wait_until(lambda: step_of(tmp_path) > left_at, "steps of the rank that is left")
    comer = start("--steps=100000", nproc=1, nnodes="1:2", port=port, is_host=False)
    wait_until(lambda: one.output.count(" on 2\n") == 2, "a second time with two ranks")
    one.process.send_signal(signal.SIGTERM)
    comer.process.send_signal(signal.SIGTERM)
    assert (one.wait(), comer.wait()) == (RESUME, RESUME), one.output + comer.output
    assert "papilio: another host joins; the ranks save and start again" in one.output
    assert f"saved at {step_of(tmp_path)}\n" in one.output


def test_a_job_that_needs_both_hosts_leaves_with_either(tmp_path: Path, start: Callable[..., AgentProcess]) -> None:
    port = free_port()
    one = start("--steps=100000", nproc=1, nnodes="2", port=port, max_restarts=3)
    taken = start("--steps=100000", nproc=1, nnodes="2", port=port, is_host=False, max_restarts=3)
    wait_until(lambda: step_of(tmp_path) > 0, "steps")
    taken.process.send_signal(signal.SIGTERM)
    assert (taken.wait(), one.wait()) == (RESUME, RESUME), one.output + taken.output


def assert_in_order(text: str, *parts: str) -> None:
    place = 0
    for part in parts:
        found = text.find(part, place)
        assert found >= 0, f"{part!r} is not in its place in\n{text}"
        place = found + len(part)
