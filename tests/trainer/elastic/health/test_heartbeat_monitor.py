"""Who is silent, by a clock and heartbeats that the test sets."""

import pytest

from papilio.trainer.elastic.health.heartbeat_monitor import LOST_AFTER_S, HeartbeatMonitor
from tests.support.heartbeats import heartbeat_of


class FakeHealthStore:
    """A health store: each rank's count of heartbeats, None for one that never gave any."""

    def __init__(self, *counts: int | None) -> None:
        self.counts = list(counts)
        self.is_answering = True
        self.num_questions = 0
        self.left: set[int] = set()

    def heartbeats(self, world_size: int) -> dict:
        self.num_questions += 1
        if not self.is_answering:
            return {}
        return {
            rank: heartbeat_of(rank, 7, count=count, has_left=rank in self.left)
            for rank, count in enumerate(self.counts)
            if count is not None
        }


class Waiting:
    """A rank that waits, second by second."""

    def __init__(self, health_store: FakeHealthStore) -> None:
        self.now_s = 100.0
        self._begin_s = self.now_s
        self._health_store = health_store
        self.watch = HeartbeatMonitor(health_store, len(health_store.counts), lambda: self.now_s)

    def wait(self, seconds: float, *speaking: int) -> str | None:
        for _ in range(int(seconds)):
            self.now_s += 1
            for rank in speaking:
                self._health_store.counts[rank] = (self._health_store.counts[rank] or 0) + 1
            lost = self.watch.lost(self.now_s - self._begin_s)
            if lost is not None:
                return lost
        return None


@pytest.mark.parametrize("count", [5, None])
def test_a_silent_rank_is_named_after_a_minute_and_not_before(count: int | None) -> None:
    waiting = Waiting(FakeHealthStore(3, count, 3))
    assert waiting.wait(LOST_AFTER_S, 0, 2) is None
    host = "unknown" if count is None else "host-1"
    assert waiting.wait(30, 0, 2) == (
        f"rank 1 (host {host}) has given no heartbeat for 60 s: the host or its network is gone"
    )
    assert waiting.watch.culprit() == (1, host)


def test_ranks_that_speak_now_and_then_are_there() -> None:
    waiting = Waiting(FakeHealthStore(3, 3))
    for _ in range(10):
        assert waiting.wait(45, 0) is None
        assert waiting.wait(5, 0, 1) is None


def test_several_silent_ranks_are_named_together() -> None:
    waiting = Waiting(FakeHealthStore(3, 3, 3))
    assert str(waiting.wait(90, 0)).startswith("rank 1 (host host-1), rank 2 (host host-2) have given no heartbeat")


def test_a_store_that_is_silent_is_named_and_no_rank() -> None:
    health_store = FakeHealthStore(3, 3)
    waiting = Waiting(health_store)
    assert waiting.wait(40, 0, 1) is None
    health_store.is_answering = False
    assert waiting.wait(LOST_AFTER_S) is None
    assert waiting.wait(10) == "the store has not answered for 60 s: its host is gone, or this one's network"
    assert waiting.watch.culprit() is None


def test_after_a_silence_of_the_store_ranks_get_their_time_anew() -> None:
    health_store = FakeHealthStore(3, 3)
    waiting = Waiting(health_store)
    assert waiting.wait(50, 0) is None
    health_store.is_answering = False
    assert waiting.wait(30) is None
    health_store.is_answering = True
    assert waiting.wait(50, 0) is None
    assert waiting.wait(30, 0) is not None


def test_a_rank_that_took_its_leave_is_not_lost() -> None:
    health_store = FakeHealthStore(3, 3)
    health_store.left = {1}
    assert Waiting(health_store).wait(300, 0) is None


def test_a_rank_that_trains_asks_nothing() -> None:
    health_store = FakeHealthStore(3, 3)
    watch = HeartbeatMonitor(health_store, 2)
    assert watch.lost(idle_s=5.0) is None
    assert HeartbeatMonitor(health_store, 1).lost(idle_s=500.0) is None
    assert health_store.num_questions == 0
