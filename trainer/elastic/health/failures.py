"""Who failed first: logged by every rank after an error, without any collective.

A rank that fails by itself notes so in the health store. A rank whose peer went away looks there for the cause, or
names the ranks whose heartbeats have stopped.
"""

from __future__ import annotations

import os
import re
import sysconfig
import time
import traceback

import torch.distributed as dist

from papilio.data_pipeline.errors import PapilioError
from papilio.trainer.elastic.health.health_store import HealthStore, RankFailure, host_name, open_health_store
from papilio.trainer.elastic.health.heartbeat import Heartbeat
from papilio.trainer.process_group import Ranks

# How long a rank that lost its peers waits for the cause: some beats, and for the agent to find the dead.
WAIT_FOR_CAUSE_S = 3.0
POLL_S = 0.1
MAX_ERROR_CHARACTERS = 300
# Errors of these say what was wrong and what fixes it; of any other, where it came from says more.
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
# As Python ends a traceback, with the rank that torch puts before it; and as our entry points say what they foresaw,
# which a rank without others does not note.
ERROR_LINE = re.compile(
    r"^(?:\[rank\d+\]: ?)?(?:papilio(?: \w+)?: error: (?=.)"
    r"|(?=[\w.]*(?:Error|Exception|Interrupt)\b|Fatal Python error\b))(.*)"
)
MAX_LOG_BYTES = 64 * 1024
# Where the Python side of a collective ends and its C++ begins.
COLLECTIVE_MODULES = frozenset(
    f"torch.distributed.{name}" for name in ("distributed_c10d", "_functional_collectives", "nn.functional")
)
# What also waits for collectives, among much else: torchrec's redistributions, DDP, a backward pass with either, and
# those of our modules that wait by themselves (`work.wait()`), where gloo's error has no frame of torch.
MIXED_PACKAGES = (
    "torchrec.distributed",
    "torch.nn.parallel",
    "torch.autograd",
    "papilio.sharding.runtime.replicas",
    "papilio.trainer.elastic.preemption",
)


class LostRankError(PapilioError):
    """Another rank failed first, or went away; the message says which and why."""

    is_retryable = True


def is_loss_of_a_peer(error: BaseException) -> bool:
    """Whether an error came out of a collective or a store: another rank went away, for whatever reason.

    NCCL and the stores raise classes of their own. Gloo raises a bare RuntimeError: where it was raised tells it. What
    is left: a bare RuntimeError about a collective's arguments cannot be told from a loss, so its text is shown when no
    rank turns out to be lost.
    """
    return isinstance(error, dist.DistError) or (_is_bare(error) and _raised_in(error) in COLLECTIVE_MODULES)


def may_be_loss_of_a_peer(error: BaseException) -> bool:
    """Whether an error came out of what runs collectives among much else: only the state of the others can tell."""
    module = _raised_in(error)
    return _is_bare(error) and any(f"{module}.".startswith(f"{package}.") for package in MIXED_PACKAGES)


def _is_bare(error: BaseException) -> bool:
    """Whether this is RuntimeError itself, and did not arise from an error that says more by its class."""
    cause = error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, PapilioError | OSError):
            return False
        cause = cause.__cause__ or cause.__context__
    return type(error) is RuntimeError


def _raised_in(error: BaseException) -> str:
    """Return the module of the innermost Python frame; empty for an error that was not raised."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""


def one_line(error: BaseException) -> str:
    """Return an error's type and first line."""
    text = " ".join(str(error).split("\n\n")[0].split())
    if len(text) > MAX_ERROR_CHARACTERS:
        text = text[: MAX_ERROR_CHARACTERS - 3] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def format_with_place(error: BaseException) -> str:
    """Return an error's type and first line, and the line of our code or the user's that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or isinstance(error, PapilioError):
        return one_line(error)
    frame = next((frame for frame in reversed(frames) if not frame.filename.startswith(LIBRARIES)), frames[-1])
    path = os.path.join(*frame.filename.split(os.sep)[-2:])
    return f"{one_line(error)} ({path}:{frame.lineno}, in {frame.name})"


def note_early_failure(error: BaseException) -> bool:
    """Note that this rank failed, for those that wait for it to join the group, unless a cause is noted.

    Returns:
        Whether it is news: False where another rank has noted the same error, and reports it.
    """
    rank, num_ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if num_ranks > 1 and not isinstance(error, LostRankError):
        text = format_with_place(error)
        first = open_health_store().note_failure(RankFailure(rank, host_name(), -1, text, time.time()))
        return first.rank == rank or first.error != text
    return True


def describe_join_failure(error: BaseException) -> str:
    """Describe why this rank could not join the others; what the first to fail has logged is not repeated."""
    first = open_health_store().first_failure()
    if first is None:
        return f"this rank could not join the others: {one_line(error)}"
    return f"this rank could not join the others, of which rank {first.rank} (host {first.host}) failed first"


def last_error(path: str | None) -> str:
    """Return, after a colon, the last line of a log that reads as an error's; nothing where there is none.

    It is what is known of a rank that failed before it could note anything, for example in an import.
    """
    if path is None or not os.path.exists(path):
        return ""
    with open(path, "rb") as log:
        log.seek(max(0, os.path.getsize(path) - MAX_LOG_BYTES))
        lines = log.read().decode(errors="replace").splitlines()
    found = [match[1] for match in map(ERROR_LINE.match, lines) if match is not None]
    return f": {found[-1][:MAX_ERROR_CHARACTERS]}" if found else ""


def note_own_failure(error: BaseException, ranks: Ranks, step: int, health_store: HealthStore) -> str | None:
    """Note that this rank failed by itself; return a line about another that did so first, for another reason."""
    text = format_with_place(error)
    first = health_store.note_failure(RankFailure(ranks.rank, host_name(), step, text, time.time()))
    return None if first.rank == ranks.rank or first.error == text else str(first)


def find_cause(
    error: BaseException, ranks: Ranks, step: int, health_store: HealthStore, wait_s: float = WAIT_FOR_CAUSE_S
) -> str | None:
    """After an error that another rank may have caused, wait for the first failure's note; return it as a line.

    When there is none, name the unresponsive ranks, and note the first of them for the others. None when all are well
    and it need not have been a collective that failed: the error is this rank's own.
    """
    before = health_store.heartbeats(ranks.world_size)
    deadline_s = time.monotonic() + wait_s
    while time.monotonic() < deadline_s:
        first = health_store.first_failure()
        if first is not None:
            return str(first)
        if not health_store.is_answering:
            return (
                f"rank {ranks.rank} lost the other ranks at step {step:,}, and the store that knows more does not "
                "answer: the host of rank 0 or of the first agent is gone, or cannot be reached"
            )
        time.sleep(POLL_S)
    lost = _note_unresponsive_ranks(before, health_store.heartbeats(ranks.world_size), ranks, health_store)
    if lost is None and is_loss_of_a_peer(error):
        return (
            "all ranks give heartbeats, yet a connection between them broke: check the network between them "
            f"({one_line(error)})"
        )
    return lost


def _note_unresponsive_ranks(
    before: dict[int, Heartbeat], after: dict[int, Heartbeat], ranks: Ranks, health_store: HealthStore
) -> str | None:
    unresponsive = unresponsive_ranks(before, after, ranks.world_size)
    if not unresponsive:
        return None
    failures = [_failure_of_unresponsive(rank, after.get(rank)) for rank in unresponsive]
    health_store.note_failure(failures[0])
    return "; ".join(f"rank {failure.rank} (host {failure.host}) {failure.error}" for failure in failures)


def _failure_of_unresponsive(rank: int, heartbeat: Heartbeat | None) -> RankFailure:
    if heartbeat is None:
        return RankFailure(rank, "unknown", -1, "went away before it gave a heartbeat", time.time())
    error = f"went away without reporting an error after step {heartbeat.step:,}: killed, or its host is gone"
    return RankFailure(rank, heartbeat.host, -1, error, time.time())


def unresponsive_ranks(before: dict[int, Heartbeat], after: dict[int, Heartbeat], world_size: int) -> list[int]:
    """Return the ranks with no new heartbeat between two readings some seconds apart, nor a last one."""
    return [
        rank
        for rank in range(world_size)
        if rank not in after
        or (not after[rank].has_left and rank in before and after[rank].count == before[rank].count)
    ]
