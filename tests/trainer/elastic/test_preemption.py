import os
import signal
import threading

import pytest
import torch.distributed as dist

from papilio.trainer.elastic.exit_codes import RESUME_EXIT_CODE
from papilio.trainer.elastic.preemption import watch_for_preemption
from papilio.trainer.process_group import Ranks
from tests.support.rank_pool import RankPool


def steps_until_agreed(ranks: Ranks, signalled_rank: int, signal_step: int) -> tuple[int, object, object]:
    """Take 60 steps at most, with a signal to one rank; return the step agreed upon and the handlers around it."""
    before = signal.getsignal(signal.SIGTERM)
    agreed = -1
    with watch_for_preemption(ranks) as preemption:
        for step in range(1, 61):
            if ranks.rank == signalled_rank and step == signal_step:
                os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(0.005 * (1 + ranks.rank))  # ranks of different speed
            dist.barrier(ranks.group)
            if preemption.is_agreed(step):
                agreed = step
                break
    return agreed, before, signal.getsignal(signal.SIGTERM)


@pytest.mark.parametrize("signalled_rank", [0, 1])
def test_all_ranks_agree_on_the_same_step_soon(two_ranks: RankPool, signalled_rank: int) -> None:
    (first, before, after), (second, *_) = two_ranks.run(steps_until_agreed, signalled_rank, 3)
    assert first == second
    # A reduction every quarter of a second, and steps of at least 10 ms.
    assert 3 <= first <= 3 + 25 + 2
    assert before == after == signal.SIG_DFL


def test_a_single_rank_needs_nobody(one_rank: RankPool) -> None:
    ((agreed, *_),) = one_rank.run(steps_until_agreed, 0, 3)
    assert agreed == 3


def test_without_a_signal_nothing_is_agreed_and_nothing_is_left(two_ranks: RankPool) -> None:
    for _ in range(2):
        assert [agreed for agreed, *_ in two_ranks.run(steps_until_agreed, -1, 0)] == [-1, -1]


def raise_on_one(ranks: Ranks) -> str:
    """Rank 1 fails before it has answered; rank 0 has asked."""
    try:
        with watch_for_preemption(ranks) as preemption:
            if ranks.rank == 1:
                raise ValueError("on purpose")
            preemption.is_agreed(1)
            raise KeyError("afterwards")
    except (KeyError, ValueError) as error:
        return type(error).__name__


def test_after_an_error_no_answer_is_waited_for() -> None:
    pool = RankPool(2)
    try:
        assert pool.run(raise_on_one) == ["KeyError", "ValueError"]
    finally:
        pool.close()


def watch_in_a_thread(ranks: Ranks) -> bool:
    """Only the main thread may set handlers."""
    found = []

    def work() -> None:
        with watch_for_preemption(ranks) as preemption:
            preemption.note_signal()
            found.append(preemption.is_agreed(1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_another_thread_can_note_the_signal_itself(one_rank: RankPool) -> None:
    assert one_rank.run(watch_in_a_thread) == [True]


def test_the_status_is_the_one_that_asks_for_another_try() -> None:
    assert RESUME_EXIT_CODE == 75
