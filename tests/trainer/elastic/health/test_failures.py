import ast
import errno
import itertools
import json
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from botocore.exceptions import ReadTimeoutError

from papilio.trainer.checkpoint.saver import SaveError
from papilio.trainer.config_file import ConfigError, build_config
from papilio.trainer.elastic.health.failures import (
    MIXED_PACKAGES,
    WAIT_FOR_CAUSE_S,
    LostRankError,
    find_cause,
    format_with_place,
    is_loss_of_a_peer,
    last_error,
    may_be_loss_of_a_peer,
    note_early_failure,
    note_own_failure,
    one_line,
)
from papilio.trainer.elastic.health.health_store import HealthStore, RankFailure, open_health_store
from papilio.trainer.elastic.health.job_health import JobHealth, job_health
from papilio.trainer.process_group import Ranks
from papilio.trainer.storage.retries import RetryPolicy, StorageError, attempt
from papilio.trainer.storage.s3_client import explain_s3_error
from tests.support.agents import REPOSITORY, AgentProcess
from tests.support.heartbeats import heartbeat_of
from tests.test_architecture import MODULES

LOST = dist.DistNetworkError("failed to recv, got 0 bytes")
GLOO_CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:29853."


def raised_in(module: str, error: Exception) -> Exception:
    """The error as it comes out of C++ called by a function of this module."""
    names: dict[str, Any] = {"__name__": module}
    exec("def call(error):\n    raise error", names)
    with pytest.raises(type(error)) as caught:
        names["call"](error)
    return caught.value


C10D, TORCHREC, DDP = "torch.distributed.distributed_c10d", "torchrec.distributed.dist_data", "torch.nn.parallel"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (raised_in(C10D, RuntimeError(GLOO_CLOSED)), True),
        (raised_in(C10D, RuntimeError("whatever a later gloo says")), True),
        (raised_in("x", dist.DistNetworkError("failed to recv, got 0 bytes")), True),
        (raised_in("x", dist.DistBackendError("NCCL error ... ncclRemoteError")), True),
        (dist.DistStoreError("no words"), True),
        (raised_in(C10D, ValueError("Connection closed by peer")), False),
        (raised_in(C10D, torch.OutOfMemoryError("timed out")), False),
        (raised_in("papilio.trainer.loop", RuntimeError("Connection reset by peer")), False),
        (RuntimeError(GLOO_CLOSED), False),
        (KeyError("x"), False),
    ],
)
def test_the_class_and_the_place_of_an_error_say_that_a_peer_is_gone(error: Exception, expected: bool) -> None:
    assert is_loss_of_a_peer(error) is expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (raised_in(TORCHREC, RuntimeError(GLOO_CLOSED)), True),
        (raised_in(f"{DDP}.distributed", RuntimeError("sizes differ")), True),
        (raised_in("torch.autograd.graph", RuntimeError("a second backward")), True),
        (raised_in("papilio.sharding.runtime.replicas", RuntimeError(GLOO_CLOSED)), True),
        (raised_in("papilio.trainer.elastic.preemption", RuntimeError(GLOO_CLOSED)), True),
        (raised_in("torch.nn.parallelism", RuntimeError("timed out")), False),
        (raised_in(TORCHREC, ValueError("timed out")), False),
        (raised_in("torch.nn.modules.linear", RuntimeError("timed out")), False),
    ],
)
def test_where_more_than_collectives_run_a_peer_may_be_gone(error: Exception, expected: bool) -> None:
    assert may_be_loss_of_a_peer(error) is expected
    assert not is_loss_of_a_peer(error)


def test_modules_that_wait_for_a_collective_by_themselves_are_known() -> None:
    """There gloo's error has no frame of torch."""
    waiting = {
        name
        for name, tree in MODULES.items()
        if name.partition(".")[0] in ("trainer", "sharding") and "dist" in ast.unparse(tree)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("_pending.wait", "work.wait", ").wait"))
    }
    # link_speed prints the error, whatever it is, and ends.
    assert {f"papilio.{name}" for name in waiting - {"trainer.calibration.link_speed"}} == {
        name for name in MIXED_PACKAGES if name.startswith("papilio.")
    }


def test_an_error_of_ours_behind_a_bare_one_is_no_loss_of_a_peer() -> None:
    error = raised_in(C10D, RuntimeError("timed out"))
    error.__cause__ = StorageError("could not write s3://b/x: timed out", errno.ETIMEDOUT)
    assert not is_loss_of_a_peer(error)


def test_a_storage_that_times_out_in_a_save_is_not_blamed_on_a_peer(health_store: HealthStore) -> None:
    """Both ranks of the job are well; what S3 did is reported as this rank's own failure."""

    def write() -> None:
        raise ReadTimeoutError(endpoint_url="https://s3")

    once = RetryPolicy(num_attempts=1)
    begin_s = time.monotonic()
    with pytest.raises(SaveError, match="Read timeout on endpoint URL") as caught, _health(rank_of(0, 2), health_store):
        try:
            attempt("write", "s3://bucket/x", write, once, explain=explain_s3_error)
        except StorageError as error:
            assert error.is_retryable
            raise SaveError(f"checkpoint s3://bucket could not be written: rank 0: {error}") from error
    first = health_store.first_failure()
    assert (first.rank, first.error) == (0, one_line(caught.value))
    assert time.monotonic() - begin_s < WAIT_FOR_CAUSE_S  # the other rank was not waited for
    assert caught.value.rank_exit_status == 1


BACKWARD_ERROR = raised_in("torch.autograd.graph", RuntimeError("Trying to backward through the graph a second time"))


def test_an_error_of_a_backward_pass_is_its_own_where_all_are_well(health_store: HealthStore) -> None:
    for rank in range(3):
        health_store.publish(heartbeat_of(rank, 119))
    assert find_cause_among_living(health_store, 0, 1, 2, error=BACKWARD_ERROR) is None
    assert health_store.first_failure() is None


def test_an_error_of_a_backward_pass_is_another_ranks_where_one_is_unresponsive(health_store: HealthStore) -> None:
    for rank in range(3):
        health_store.publish(heartbeat_of(rank, 119))
    found = find_cause_among_living(health_store, 0, 2, error=BACKWARD_ERROR)
    assert found.startswith("rank 1 (host host-1) went away")


def _health(ranks: Ranks, health_store: HealthStore) -> AbstractContextManager[JobHealth]:
    return job_health(ranks, 60.0, health_store, exit_timeout_s=None)


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
    found = find_cause(LOST, rank_of(0), 120, health_store, wait_s=30)
    timer.join()
    assert found == "rank 2 (host h) failed first, at step 120: ValueError: bad batch"


def find_cause_among_living(health_store: HealthStore, *living: int, error: Exception = LOST) -> str | None:
    """Whenever rank 0 has looked and sleeps, the living give a heartbeat, however busy the machine is."""
    counts, sleep = itertools.count(10), time.sleep

    def sleep_while_others_beat(seconds: float) -> None:
        count = next(counts)
        for rank in living:
            health_store.publish(heartbeat_of(rank, 120, count=count))
        sleep(seconds)

    with patch("time.sleep", sleep_while_others_beat):
        return find_cause(error, rank_of(0), 120, health_store, wait_s=1)


def test_without_a_note_the_silent_rank_is_named(health_store: HealthStore) -> None:
    for rank in range(3):
        health_store.publish(heartbeat_of(rank, 119))
    expected = "(host host-1) went away without reporting an error after step 119: killed, or its host is gone"
    assert find_cause_among_living(health_store, 0, 2) == f"rank 1 {expected}"
    # The next rank that looks finds it noted.
    assert find_cause(LOST, rank_of(2), 120, health_store, wait_s=0.2).endswith("killed, or its host is gone")


def test_a_rank_that_took_its_leave_or_never_came_is_told_apart(health_store: HealthStore) -> None:
    health_store.publish(heartbeat_of(1, 119, has_left=True))
    assert find_cause_among_living(health_store, 0) == "rank 2 (host unknown) went away before it gave a heartbeat"


def test_when_all_live_the_network_is_suspected(health_store: HealthStore) -> None:
    for rank in range(3):
        health_store.publish(heartbeat_of(rank, 119))
    assert "all ranks give heartbeats, yet a connection" in find_cause_among_living(health_store, 0, 1, 2)


def test_a_store_that_is_gone_is_no_riddle() -> None:
    found = find_cause(LOST, rank_of(1), 1_234, HealthStore(None))
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
