"""Heartbeats, and the end of a rank that waits for ever.

Each rank has a thread that writes, once a second, where its training stands into the health store; the step itself only
assigns a few attributes. When nothing has moved here for `stall_timeout_s`, the thread reads the others' heartbeats,
reports which ranks have not arrived, prints this rank's stack and ends the process, so that the agent can start it
again. It does so sooner when another rank's heartbeats stop (trainer/elastic/health/heartbeat_monitor.py).

The thread must outlast what it watches for, so it reads numbers in host memory only: a tensor of a hung device would
block it too. An error in it is logged once and the watch goes on: a job of days should not end because its guard
stumbled, and a rank that stalls must be ended all the same.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from papilio.trainer.compat import torch_internals
from papilio.trainer.elastic.health.failures import one_line, unresponsive_ranks
from papilio.trainer.elastic.health.health_store import HealthStore, RankFailure, host_name
from papilio.trainer.elastic.health.heartbeat import Heartbeat, RankFigures
from papilio.trainer.elastic.health.heartbeat_monitor import HeartbeatMonitor
from papilio.trainer.elastic.health.stragglers import describe_ranks
from papilio.trainer.process_group import Ranks

logger = logging.getLogger(__name__)

BEAT_S = 1.0
# Between two readings of the heartbeats so far apart, every live rank has published a new one.
READINGS_APART_S = 2.5
# After another rank's failure was noted, how long this one may be stuck before it is ended.
GRACE_AFTER_FAILURE_S = 15.0
# The last view of the run may go to a storage that hangs as well; then the process ends without it.
LAST_VIEW_TIMEOUT_S = 15.0


class Watchdog:
    """The thread that watches one rank; `mark` is called by the training as it progresses."""

    def __init__(self, ranks: Ranks, stall_timeout_s: float, health_store: HealthStore) -> None:
        self._ranks = ranks
        self._stall_timeout_s = stall_timeout_s
        self._health_store = health_store
        self._monitor = HeartbeatMonitor(health_store, ranks.world_size)
        self._step = 0
        self._phase = "start-up"
        self._num_marks = 0
        self._count = 0
        self._moved_s = time.monotonic()
        self._seen = (0, 0)
        self._failure_seen_s: float | None = None
        self._has_warned = False
        self._has_ended = threading.Event()
        self._agent_pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._figures: Callable[[], RankFigures] | None = None
        self._at_end: Callable[[str], None] | None = None
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    @property
    def step(self) -> int:
        """The step marked last."""
        return self._step

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def mark(self, step: int, phase: str) -> None:
        """Note that this rank makes progress: it is at `step`, in `phase`."""
        self._step = step
        self._phase = phase
        self._num_marks += 1

    def show(self, figures: Callable[[], RankFigures], at_end: Callable[[str], None] | None = None) -> None:
        """Put these into every heartbeat from now on; `at_end` gets the reason if this process is ended here.

        Both are called in the watchdog's thread: `figures` returns numbers that lie ready, and asks no device;
        `at_end` is given LAST_VIEW_TIMEOUT_S.
        """
        self._figures = figures
        self._at_end = at_end

    def heartbeat(self, *, has_left: bool = False) -> Heartbeat:
        """Return this rank's heartbeat as it is now."""
        return Heartbeat(
            rank=self._ranks.rank,
            host=host_name(),
            step=self._step,
            phase=self._phase,
            num_collectives=self._seen[1],
            count=self._count,
            idle_s=self._idle_s(),
            unix_s=time.time(),
            has_left=has_left,
            figures=self._own_figures(),
        )

    def end(self, *, has_failed: bool) -> None:
        """Stop watching and publish a last heartbeat. It may be called once."""
        self._has_ended.set()
        self._thread.join(BEAT_S)
        self._phase = "failed" if has_failed else "done"
        if self._health_store.is_answering:
            self._publish(has_left=True)

    def _own_figures(self) -> RankFigures | None:
        try:
            return None if self._figures is None else self._figures()
        except Exception:
            self._warn_once("has no figures of its rank")
            return None

    def _run(self) -> None:
        self._guarded(self._publish)
        while not self._has_ended.wait(BEAT_S):
            self._beat()

    def _guarded(self, act: Callable[[], object]) -> None:
        """Do a part of a beat. An error in it is logged once and does not end the watch: the rank could hang unseen."""
        try:
            act()
        except Exception:
            self._warn_once("failed in a beat")

    def _warn_once(self, what: str) -> None:
        """Log the error being handled, with its traceback; the next beat would most likely say the same."""
        if not self._has_warned:
            logger.exception("the watchdog of rank %d %s; it keeps watching", self._ranks.rank, what)
        self._has_warned = True

    def _beat(self) -> None:
        if self._agent_pid is not None and os.getppid() != self._agent_pid:
            self._leave_without_agent()
        # One by one: what fails, fails alone, and the end of a rank that stalls does not depend on the rest.
        self._look()
        self._guarded(self._publish)
        if self._idle_s() > self._stall_timeout_s:
            self._guarded(self._end_if_stalled)
        else:
            self._guarded(self._follow_the_first_failure)
            self._guarded(self._end_if_left_alone)

    def _look(self) -> None:
        num_collectives = self._seen[1]
        try:
            num_collectives = torch_internals.num_collectives()
        except Exception:  # marks still count as moves: a rank that trains must not be taken for stalled
            self._warn_once("cannot count its collectives")
        seen = (self._num_marks, num_collectives)
        if seen != self._seen:
            self._seen = seen
            self._moved_s = time.monotonic()

    def _idle_s(self) -> float:
        return time.monotonic() - self._moved_s

    def _publish(self, *, has_left: bool = False) -> Heartbeat:
        self._count += 1
        heartbeat = self.heartbeat(has_left=has_left)
        self._guarded(lambda: self._health_store.publish(heartbeat))
        return heartbeat

    def _end_if_stalled(self) -> None:
        try:
            line = self._describe_stall()
        except Exception as error:
            self._warn_once("cannot find out which ranks are late")
            line = f"{self._stalled()} which ranks are late is unknown ({one_line(error)})"
        if line is not None:
            self._end_process(line)

    def _stalled(self) -> str:
        return f"nothing has moved for {self._idle_s():.0f} s (train.stall_timeout_s = {self._stall_timeout_s:g}):"

    def _describe_stall(self) -> str | None:
        """Find out which ranks are late and note that for the others; None if this rank moves after all."""
        before = self._health_store.heartbeats(self._ranks.world_size)
        if self._has_ended.wait(READINGS_APART_S):
            return None
        self._look()
        if self._idle_s() < self._stall_timeout_s:
            return None
        own = self._publish()
        after = self._health_store.heartbeats(self._ranks.world_size)
        late = late_ranks(before, after, self._ranks.world_size)
        what = describe_stall(late, after, own, self._ranks.world_size, time.time())
        line = f"{self._stalled()} {what}"
        culprit = late[0] if late else self._ranks.rank
        host = after[culprit].host if culprit in after else "unknown"
        self._health_store.note_failure(RankFailure(culprit, host, -1, line, time.time()))
        return line

    def _end_if_left_alone(self) -> None:
        """End this rank when it waits for one whose host is gone: no connection would report that."""
        lost = self._monitor.lost(self._idle_s())
        if lost is None:
            return
        line = f"nothing has moved for {self._idle_s():.0f} s: {lost}"
        culprit = self._monitor.culprit()
        if culprit is not None:
            self._health_store.note_failure(RankFailure(*culprit, -1, line, time.time()))
        self._end_process(line)

    def _leave_without_agent(self) -> NoReturn:
        """End this rank, which nobody would start again or end."""
        failure = RankFailure(self._ranks.rank, host_name(), self._step, "its agent is gone", time.time())
        self._health_store.note_failure(failure)
        print(f"papilio: {failure}; this rank ends too", file=sys.stderr, flush=True)
        os._exit(1)

    def _follow_the_first_failure(self) -> None:
        """End this rank when it is stuck after another has failed: NCCL would let it wait."""
        first = self._health_store.first_failure()
        if first is None or first.rank == self._ranks.rank:
            return
        now_s = time.monotonic()
        self._failure_seen_s = self._failure_seen_s or now_s
        if min(self._idle_s(), now_s - self._failure_seen_s) > GRACE_AFTER_FAILURE_S:
            self._end_process(f"{first}; rank {self._ranks.rank} timed out waiting for it")

    def _end_process(self, line: str) -> NoReturn:
        # Whatever blocks or fails below, a log that nobody reads or a storage that hangs: the process ends.
        timer = threading.Timer(LAST_VIEW_TIMEOUT_S, os._exit, [1])
        timer.daemon = True
        timer.start()
        try:
            self._explain_end(line)
        finally:
            os._exit(1)

    def _explain_end(self, line: str) -> None:
        print(f"papilio: {line}", file=sys.stderr, flush=True)
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        print(f"Stack of rank {self._ranks.rank} (most recent call last):\n{stack}", file=sys.stderr, flush=True)
        if self._at_end is not None:
            self._at_end(line)


def late_ranks(before: dict[int, Heartbeat], after: dict[int, Heartbeat], world_size: int) -> list[int]:
    """Return the ranks that the others wait for: the unresponsive ones, else those with the fewest collectives.

    Empty when all stand at the same place.
    """
    gone = {rank for rank, heartbeat in after.items() if heartbeat.has_left}
    unresponsive = sorted(gone.union(unresponsive_ranks(before, after, world_size)))
    if unresponsive:
        return unresponsive
    places = {rank: (heartbeat.step, heartbeat.num_collectives) for rank, heartbeat in after.items()}
    behind = [rank for rank, place in places.items() if place < max(places.values())]
    return sorted(behind)


def describe_stall(
    late: list[int], heartbeats: dict[int, Heartbeat], own: Heartbeat, world_size: int, now_unix_s: float
) -> str:
    """Say which ranks have not arrived, with their last heartbeats, and which wait for them."""
    here = f"after step {own.step:,} ({own.phase})"
    if world_size == 1:
        return f"the only rank stands still {here}"
    if not heartbeats:
        return f"rank {own.rank} stands {here}; the store with the other ranks' heartbeats does not answer"
    if not late:
        return f"all {world_size} ranks stand still {here}"
    next_step = max(heartbeat.step for heartbeat in heartbeats.values()) + 1
    described = "; ".join(_describe_late(rank, heartbeats.get(rank), next_step, now_unix_s) for rank in late)
    waiting = [rank for rank in range(world_size) if rank not in late]
    return f"{described}; {describe_ranks(waiting)} wait{'s' if len(waiting) == 1 else ''}" if waiting else described


def _describe_late(rank: int, heartbeat: Heartbeat | None, next_step: int, now_unix_s: float) -> str:
    if heartbeat is None:
        return f"rank {rank} has not arrived and never gave a heartbeat"
    age_s = max(0.0, now_unix_s - heartbeat.unix_s) + heartbeat.idle_s
    return (
        f"rank {rank} has not arrived at step {next_step:,}: last heartbeat at step {heartbeat.step:,} "
        f"({heartbeat.phase}), {age_s:.0f} s ago, host {heartbeat.host}"
    )
