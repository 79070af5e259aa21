import functools
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from papilio.trainer.elastic.health import step_timer
from papilio.trainer.elastic.health.health_store import HealthStore
from papilio.trainer.elastic.health.heartbeat import Heartbeat, RankFigures
from papilio.trainer.elastic.health.watchdog import Watchdog, describe_ranks, describe_stall, late_ranks
from papilio.trainer.process_group import Ranks
from tests.support.agents import REPOSITORY, AgentProcess, wait_until
from tests.support.heartbeats import heartbeat_of


def heartbeats(*steps_and_collectives: tuple[int, int], count: int = 1) -> dict:
    return {
        rank: heartbeat_of(rank, step, num_collectives=collectives, count=count)
        for rank, (step, collectives) in enumerate(steps_and_collectives)
    }


class Refusing(HealthStore):
    """A store in which nothing can be published."""

    def publish(self, heartbeat: Heartbeat) -> None:
        raise RuntimeError("no heartbeat today")


@pytest.mark.parametrize("broken", ["figures", "store"])
def test_a_watchdog_that_fails_in_a_beat_says_so_once_and_still_ends_a_stalled_rank(
    broken, monkeypatch, caplog
) -> None:
    monkeypatch.setattr("papilio.trainer.elastic.health.watchdog.BEAT_S", 0.01)
    beats, ended = [], threading.Event()
    store = Refusing(None) if broken == "store" else HealthStore(None)
    watchdog = Watchdog(Ranks(0, 1, 0, 1, torch.device("cpu"), None), 1e9, store)

    def figures():
        beats.append(1)
        if broken == "figures":
            raise ValueError("no figures today")
        return RankFigures(1.0, 0.0)

    watchdog.show(figures)
    monkeypatch.setattr(watchdog, "_end_if_stalled", ended.set)
    watchdog.start()
    wait_until(lambda: len(beats) > 5, "some beats")
    assert not ended.is_set()
    watchdog._stall_timeout_s = -1.0
    assert ended.wait(30)
    watchdog.end(has_failed=True)
    found = [record for record in caplog.records if "watchdog of rank 0" in record.message]
    assert len(found) == 1 and "it keeps watching" in found[0].message and found[0].exc_info is not None


class DeviceLengths:
    """Lengths of bags on a device that hangs for any thread but the training's."""

    def __init__(self, values: list[int]) -> None:
        self._values, self._owner = torch.tensor(values), threading.get_ident()

    def numpy(self):
        while threading.get_ident() != self._owner:
            threading.Event().wait()
        return self._values.numpy()


class Lookup(nn.Module):
    """Two tables of one feature each, as TorchRec's lookups show theirs."""

    def __init__(self) -> None:
        super().__init__()
        tables = [
            SimpleNamespace(name=name, feature_names=["f"], local_cols=cols) for name, cols in (("a", 4), ("b", 8))
        ]
        self._emb_modules = [SimpleNamespace(config=SimpleNamespace(embedding_tables=tables))]

    def forward(self, features: object) -> None:
        """Look nothing up."""


def test_figures_ask_no_device_whatever_the_step_left_there(monkeypatch) -> None:
    lookup = Lookup()
    monkeypatch.setattr(step_timer, "_lookups", lambda model: [lookup])
    timer = step_timer.StepTimer(nn.Module(), torch.device("cpu"), SimpleNamespace(train_s=2.0, wait_s=0.5), every_s=0)
    for lengths in ([1, 1, 3, 1], [9, 9, 9, 9]):  # of two bags of each table: 2 and 4 ids, rows of 4 and 8 columns
        features = SimpleNamespace(lengths=functools.partial(DeviceLengths, lengths))
        with timer.timed(1.0):
            lookup(features)
    found: list[RankFigures] = []
    thread = threading.Thread(target=lambda: found.append(timer.figures()), daemon=True)
    thread.start()
    thread.join(30)
    assert found, "the watchdog's thread would hang with the device"
    assert (found[0].train_s, found[0].wait_s, found[0].num_timed) == (2.0, 0.5, 1)
    assert found[0].tables == (("b", 0.8), ("a", 0.2)), "of the step before: its 4 * 8 and 2 * 4 columns"


def test_a_step_that_the_gpu_has_not_ended_is_neither_waited_for_nor_counted(monkeypatch) -> None:
    lookup, event = Lookup(), SimpleNamespace(query=lambda: False)
    monkeypatch.setattr(step_timer, "_lookups", lambda model: [lookup])
    monkeypatch.setattr(step_timer.StepTimer, "_now", lambda self: event)
    monkeypatch.setattr(step_timer.StepTimer, "_in_host_memory", lambda self, lengths: lengths)
    timer = step_timer.StepTimer(nn.Module(), torch.device("cuda"), SimpleNamespace(train_s=2.0, wait_s=0.5), every_s=0)
    for _ in range(2):
        with timer.timed(1.0):
            lookup(SimpleNamespace(lengths=lambda: None))  # of None any question would fail
    assert (timer.figures().num_timed, timer.figures().tables) == (0, ())


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
    assert late_ranks(heartbeats(*places), heartbeats(*places, count=3), 3) == expected


def test_a_rank_that_is_unresponsive_gone_or_never_came_is_late_before_all_others() -> None:
    before, after = heartbeats((9, 70), (9, 70), (9, 69)), heartbeats((9, 70), (9, 70), (9, 69), count=3)
    assert late_ranks(before, {**after, 1: before[1]}, 3) == [1]
    assert late_ranks(before, {**after, 0: heartbeat_of(0, 9, count=2, has_left=True)}, 3) == [0]
    assert late_ranks(before, after, 4) == [3]


def test_a_stall_is_described_with_the_last_heartbeat() -> None:
    found = heartbeats((1_234, 70), (1_234, 70), (1_234, 70))
    found[3] = heartbeat_of(3, 1_233, idle_s=61.5, unix_s=1e9 - 0.5)
    assert describe_stall([3], found, found[0], 4, 1e9) == (
        "rank 3 has not arrived at step 1,235: last heartbeat at step 1,233 (training), 62 s ago, host host-3; "
        "ranks 0-2 wait"
    )
    del found[3]
    assert describe_stall([3], found, found[0], 4, 1e9).startswith(
        "rank 3 has not arrived and never gave a heartbeat; ranks 0-2 wait"
    )


def test_a_stall_without_a_late_rank_is_described_too() -> None:
    found = heartbeats((5, 7), (5, 7))
    assert describe_stall([], found, found[0], 2, 1e9) == "all 2 ranks stand still after step 5 (training)"
    assert describe_stall([0, 1], {}, found[0], 2, 1e9) == (
        "rank 0 stands after step 5 (training); the store with the other ranks' heartbeats does not answer"
    )
    assert describe_stall([0], {}, found[0], 1, 1e9) == "the only rank stands still after step 5 (training)"


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [([3], "rank 3"), ([0, 1, 2], "ranks 0-2"), ([0, 2, 3, 7], "ranks 0, 2-3, 7")],
)
def test_ranks_are_written_as_spans(ranks: list[int], expected: str) -> None:
    assert describe_ranks(ranks) == expected


@pytest.mark.parametrize(
    ("event", "limit", "expected"),
    [
        ("sleep", "--stall-timeout-s=6", "rank 1 has not arrived at step 12: last heartbeat at step .*; rank 0 waits"),
        (
            "SIGSTOP",
            "--lost-after-s=8",
            r"rank 1 \(host \S+\) has given no heartbeat for 8 s: the host or its network is gone",
        ),
    ],
    ids=["late", "unresponsive"],
)
def test_a_rank_that_does_not_arrive_is_named_and_the_job_starts_again(
    tmp_path: Path, event: str, limit: str, expected: str
) -> None:
    agent = AgentProcess(tmp_path, f"--event={event}:1:12", limit, max_restarts=1)
    try:
        assert agent.wait(120) == 0, agent.output
    finally:
        agent.kill()
    assert re.search(expected, agent.output)
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


FAILS_AT_EVERY_BEAT = """
import sys, time
from papilio.trainer.elastic.health import watchdog
from papilio.trainer.elastic.health.job_health import job_health
from papilio.trainer.process_group import process_group
watchdog.BEAT_S = watchdog.READINGS_APART_S = 0.05

def fail(*_, **__):
    raise KeyError("no such heartbeat")

BROKEN = fail
with process_group() as ranks, job_health(ranks, 1e9) as health:
    for _ in range(10):
        time.sleep(0.1)
        health.mark(7, "saving")
    print("still trains", file=sys.stderr, flush=True)
    health._watchdog._stall_timeout_s = 2
    time.sleep(300)
"""


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("watchdog.Watchdog._publish", r"which ranks are late is unknown \(KeyError: 'no such heartbeat'\)"),
        ("watchdog.Watchdog._follow_the_first_failure", "the only rank stands still after step 7 "),
        ("watchdog.torch_internals.num_collectives", "the only rank stands still after step 7 "),
    ],
)
def test_an_error_in_the_watchdog_is_logged_once_and_the_watch_goes_on(broken: str, reason: str) -> None:
    code = FAILS_AT_EVERY_BEAT.replace("BROKEN", broken)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("the watchdog of rank 0 ") == 1
    assert done.stderr.count("Traceback (most recent call last)") == 1
    before, _, after = done.stderr.partition("still trains")
    assert "nothing has moved" not in before
    assert re.search(rf"nothing has moved for \d+ s \(train\.stall_timeout_s = 2\): {reason}", after)


def test_the_end_of_a_stalled_rank_does_not_wait_for_a_storage_that_hangs() -> None:
    code = STANDS_STILL.replace(
        "    health.mark(7",
        "    import threading\n"
        "    from papilio.trainer.elastic.health import watchdog\n"
        "    watchdog.LAST_VIEW_TIMEOUT_S = 0.2\n"
        "    health._watchdog.show(None, lambda line: threading.Event().wait())\n"
        "    health.mark(7",
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "the only rank stands still after step 7 (saving)" in done.stderr


MOVES = """
import time, types, torch, torch.distributed as dist
from papilio.trainer.elastic.health import watchdog
from papilio.trainer.elastic.health.health_store import HealthStore
from papilio.trainer.process_group import process_group
now_s = 0.0
watchdog.time = types.SimpleNamespace(monotonic=lambda: now_s, time=time.time)
with process_group() as ranks:
    found = watchdog.Watchdog(ranks, 1.0, HealthStore(None))
    for second in range(25):
        now_s += 0.9
        found.mark(second, "training") if MARKS else dist.all_reduce(torch.zeros(1))
        found._look()
        assert found.heartbeat().idle_s == 0.0
    now_s += 1.5
    found._look()
    assert found.heartbeat().idle_s == 1.5
"""


@pytest.mark.parametrize("has_marks", [True, False])
def test_marks_and_collectives_count_as_moves(has_marks: bool) -> None:
    code = MOVES.replace("MARKS", str(has_marks))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
