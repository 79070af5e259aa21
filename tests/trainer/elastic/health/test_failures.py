import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from papilio.trainer.config_file import ConfigError, build_config
from papilio.trainer.elastic.health.failures import (
    LostRankError,
    find_cause,
    format_with_place,
    is_loss_of_a_peer,
    last_error,
    note_early_failure,
    note_own_failure,
    one_line,
)
from papilio.trainer.elastic.health.health_store import HealthStore, RankFailure, open_health_store
from papilio.trainer.process_group import Ranks
from tests.support.agents import REPOSITORY, AgentProcess
from tests.support.heartbeats import heartbeat_of

GLOO_CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:29853."


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(GLOO_CLOSED), True),
        (RuntimeError("... Read error [10.0.0.2]:31: Connection reset by peer"), True),
        (RuntimeError("... Timed out waiting 600000ms for recv operation to complete"), True),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (RuntimeError("NCCL error ... ncclRemoteError: A call failed possibly due to a network error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("Connection closed by peer"), False),
        (KeyError("x"), False),
    ],
)
def test_which_errors_say_only_that_a_peer_is_gone(error: Exception, expected: bool) -> None:
    assert is_loss_of_a_peer(error) is expected


def test_an_error_fits_on_a_line() -> None:
    assert one_line(ValueError("a\n  b\n\nmore")) == "ValueError: a b"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert one_line(ValueError("x" * 1_000)) == "ValueError: " + "x" * 297 + "..."


def test_an_error_is_told_with_the_line_of_the_user_that_it_came_from() -> None:
    with pytest.raises(ValueError, match="dimensions") as caught:
        np.concatenate([np.zeros(2), np.zeros((2, 2))])
    with pytest.raises(json.JSONDecodeError) as deep:
        json.loads("{")
    line = test_an_error_is_told_with_the_line_of_the_user_that_it_came_from.__code__.co_firstlineno
    place = f"in {test_an_error_is_told_with_the_line_of_the_user_that_it_came_from.__name__})"
    assert format_with_place(caught.value).endswith(f" (health/test_failures.py:{line + 2}, {place}")
    assert format_with_place(deep.value).endswith(f" (health/test_failures.py:{line + 4}, {place}")


def test_an_error_of_ours_says_enough_by_itself() -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({"name": "x"}, source="r.toml")
    assert format_with_place(caught.value) == one_line(caught.value)


def test_what_fails_before_the_group_is_noted_for_those_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {"PET_RDZV_ENDPOINT": f"localhost:{store.port}", "TORCHELASTIC_RUN_ID": "j", "MASTER_ADDR": "a"}
    environment |= {"MASTER_PORT": "1", "RANK": "5", "WORLD_SIZE": "8"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    note_early_failure(LostRankError("rank 2 failed first"))
    assert open_health_store().first_failure() is None
    note_early_failure(ConfigError("recipe: there is no key train.epoch"))
    first = open_health_store().first_failure()
    assert first is not None
    assert (first.rank, first.step, first.error) == (5, -1, "ConfigError: recipe: there is no key train.epoch")


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            "Traceback ...\n  File x\nModuleNotFoundError: No module named 'a'\n",
            ": ModuleNotFoundError: No module named 'a'",
        ),
        ("[rank1]: torch.OutOfMemoryError: CUDA out of memory\nbye\n", ": torch.OutOfMemoryError: CUDA out of memory"),
        ("Fatal Python error: Segmentation fault\n", ": Fatal Python error: Segmentation fault"),
        ("WARNING: x\npapilio evaluate: error: a key is wrong\nbye\n", ": a key is wrong"),
        ("papilio: rank 1 failed first\nno error: here\n", ""),
    ],
)
def test_the_last_error_of_a_log(tmp_path: Path, log: str, expected: str) -> None:
    (tmp_path / "stderr.log").write_text(log)
    assert last_error(str(tmp_path / "stderr.log")) == expected
    assert last_error(str(tmp_path / "none.log")) == last_error(None) == ""


@pytest.fixture
def health_store(tmp_path: Path) -> HealthStore:
    return HealthStore(dist.FileStore(str(tmp_path / "store"), -1))


def rank_of(rank: int, world_size: int = 3) -> Ranks:
    """A rank without a group: nothing here may run a collective."""
    return Ranks(rank, world_size, rank, world_size, torch.device("cpu"), None)


def test_a_second_failure_tells_of_the_first_unless_it_is_the_same(health_store: HealthStore) -> None:
    assert note_own_failure(ValueError("bad batch"), rank_of(2), 120, health_store) is None
    assert note_own_failure(ValueError("bad batch"), rank_of(0), 120, health_store) is None
    told = note_own_failure(OSError("disk full"), rank_of(1), 121, health_store)
    assert told.startswith("rank 2 (host ")
    assert told.endswith(") failed first, at step 120: ValueError: bad batch")


def test_the_cause_is_waited_for(health_store: HealthStore) -> None:
    failure = RankFailure(2, "h", 120, "ValueError: bad batch", 0.0)
    timer = threading.Timer(0.3, health_store.note_failure, [failure])
    timer.start()
    found = find_cause(rank_of(0), 120, health_store, wait_s=30)
    timer.join()
    assert found == "rank 2 (host h) failed first, at step 120: ValueError: bad batch"


def find_cause_among_living(health_store: HealthStore, *living: int) -> str:
    """Whenever rank 0 has looked and sleeps, the living give a heartbeat, however busy the machine is."""
    counts, sleep = itertools.count(10), time.sleep

    def sleep_while_others_beat(seconds: float) -> None:
        count = next(counts)
        for rank in living:
            health_store.publish(heartbeat_of(rank, 120, count=count))
        sleep(seconds)

    with patch("time.sleep", sleep_while_others_beat):
        return find_cause(rank_of(0), 120, health_store, wait_s=1)


def test_without_a_note_the_silent_rank_is_named(health_store: HealthStore) -> None:
    for rank in range(3):
        health_store.publish(heartbeat_of(rank, 119))
    expected = "(host host-1) went away without reporting an error after step 119: killed, or its host is gone"
    assert find_cause_among_living(health_store, 0, 2) == f"rank 1 {expected}"
    # The next rank that looks finds it noted.
    assert find_cause(rank_of(2), 120, health_store, wait_s=0.2).endswith("killed, or its host is gone")


def test_a_rank_that_took_its_leave_or_never_came_is_told_apart(health_store: HealthStore) -> None:
    health_store.publish(heartbeat_of(1, 119, has_left=True))
    assert find_cause_among_living(health_store, 0) == "rank 2 (host unknown) went away before it gave a heartbeat"


def test_when_all_live_the_network_is_suspected(health_store: HealthStore) -> None:
    for rank in range(3):
        health_store.publish(heartbeat_of(rank, 119))
    assert "all ranks give heartbeats, yet a connection" in find_cause_among_living(health_store, 0, 1, 2)


def test_a_store_that_is_gone_is_no_riddle() -> None:
    found = find_cause(rank_of(1), 1_234, HealthStore(None))
    assert found.startswith("rank 1 lost the other ranks at step 1,234, and the store that knows more does not answer")


def test_under_plain_torchrun_a_killed_rank_is_found_by_its_silence(tmp_path: Path) -> None:
    """torchrun ends the other ranks with SIGTERM at once; they say what they know before they go."""
    agent = AgentProcess(tmp_path, "--event=SIGKILL:1:12", launcher="torch.distributed.run")
    try:
        assert agent.wait() == 1
        found = [line for line in agent.output.splitlines() if line.startswith("[0]:toy: error: rank 1 (host ")]
        assert len(found) == 1, agent.output
        assert "went away without reporting an error after step " in found[0]
    finally:
        agent.kill()


HANGS_AFTER_AN_ERROR = """
import time, torch.distributed as dist
from papilio.trainer.elastic.health.job_health import job_health
from papilio.trainer.process_group import process_group
with process_group() as ranks:
    try:
        with job_health(ranks, 60.0, exit_timeout_s=0.5):
            raise ValueError("on purpose")
    except ValueError:
        time.sleep(300)
"""


def test_a_process_that_hangs_after_an_error_is_ended() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS_AFTER_AN_ERROR], cwd=REPOSITORY, timeout=60, check=False)
    assert done.returncode == 1
