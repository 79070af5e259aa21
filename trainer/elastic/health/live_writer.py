"""Rank 0's thread that merges all ranks' heartbeats: live.json in the run folder, and alerts in the log.

It is a thread of its own, beside the watchdog's: a storage that does not answer must not stop the heartbeats.
"""

from __future__ import annotations

import logging
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from papilio.data_pipeline.paths import join
from papilio.trainer.elastic.health.health_store import HealthStore
from papilio.trainer.elastic.health.heartbeat import Heartbeat
from papilio.trainer.elastic.health.live_view import LIVE, AlertView, CheckpointView, JobState, LiveView, RankView
from papilio.trainer.elastic.health.stragglers import RankState, StragglerDetector
from papilio.trainer.storage.api import is_remote, write_ephemeral
from papilio.trainer.storage.retries import RetryPolicy, StorageError

logger = logging.getLogger(__name__)

# How often heartbeats are read and the view is written. Of many ranks it takes milliseconds of Python, for which the
# step's thread may have to wait (benchmarks/live_view.py), and a remote storage charges for each.
LOOK_EVERY_S = 2.0
MANY_RANKS, LOOK_AT_MANY_EVERY_S = 64, 10.0
WRITE_REMOTE_EVERY_S = 30.0
# Speeds are over so many looks.
NUM_LOOKS = 8
CLOSE_TIMEOUT_S = 10.0
# What is not written now is written next time.
ONE_TRY = RetryPolicy(num_attempts=1)
# Worth showing in the progress line: this share of a step.
BEHIND_SHARE = 0.05
MIN_CHECKPOINT_AGE_S = 60.0
# Kind of an alert about what the model learns, rather than about ranks.
MODEL = "model"


@dataclass(frozen=True)
class RunStatus:
    """Where the run is, as rank 0's loop knows it."""

    step: int
    num_steps: int
    num_samples: int
    train_s: float
    epoch: int
    num_epochs: int
    epoch_share: float
    loss: float
    validation_auc: float | None
    checkpoint: CheckpointView | None
    alerts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """What is watched: a run of `world_size` ranks in a folder, and where to ask how far it is."""

    name: str
    folder: str
    world_size: int
    status: Callable[[], RunStatus]


class LiveWriter:
    """Reads, judges, logs and writes, until it is closed."""

    def __init__(
        self,
        run: Run,
        health_store: HealthStore,
        own_heartbeat: Callable[[], Heartbeat],
        detector: StragglerDetector | None = None,
    ) -> None:
        """`own_heartbeat` gives this rank's, should the store not answer."""
        self._run = run
        self._health_store = health_store
        self._own_heartbeat = own_heartbeat
        self._detector = detector or StragglerDetector()
        self._look_every_s = LOOK_EVERY_S if run.world_size <= MANY_RANKS else LOOK_AT_MANY_EVERY_S
        self._is_remote = is_remote(run.folder)
        self.interval_s = max(self._look_every_s, WRITE_REMOTE_EVERY_S if self._is_remote else 0.0)
        self._written_s = -math.inf
        self._has_warned = False
        self._seen: dict[int, tuple[int, float]] = {}  # the count of a rank's heartbeat, and when it was first seen
        self._looks: deque[tuple[RunStatus, dict[int, Heartbeat]]] = deque(maxlen=NUM_LOOKS)
        self._view: LiveView | None = None
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="live_view", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self, state: JobState, error: str | None = None) -> None:
        """Write a last view with how the job ended. It may be called once."""
        self._has_ended.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            self._write(self.look(state, error))

    def progress_note(self) -> str:
        """Return what of the latest look is worth showing in the progress line, each followed by two blanks."""
        view = self._view
        return "" if view is None else format_progress_note(view)

    def look(self, state: JobState = "running", error: str | None = None) -> LiveView:
        """Read all ranks' heartbeats, log what is new, and return the view."""
        heartbeats = self._health_store.heartbeats(self._run.world_size)
        own = self._own_heartbeat()
        heartbeats = {own.rank: own} | heartbeats
        status, now_s = self._run.status(), time.monotonic()
        for rank, heartbeat in heartbeats.items():
            if rank not in self._seen or self._seen[rank][0] != heartbeat.count:
                self._seen[rank] = (heartbeat.count, now_s)
        if state == "running" and len(heartbeats) == self._run.world_size:
            for line in self._detector.look(_states(heartbeats), now_s):
                logger.warning("%s", line)
        if self._looks and self._looks[-1][0].step == status.step:
            self._looks.pop()  # speeds are those of the latest steps, also while the job validates
        self._looks.append((status, heartbeats))
        self._view = self._make_view(status, heartbeats, now_s, state, error)
        return self._view

    def _follow(self) -> None:
        while not self._has_ended.wait(self._look_every_s):
            try:
                view = self.look()
                if time.monotonic() - self._written_s >= self.interval_s - self._look_every_s / 2:
                    self._write(view)
            except Exception:  # one view less, but the thread lives on
                if not self._has_warned:
                    logger.exception("the view of the job's ranks failed; `papilio status` shows an old one")
                self._has_warned = True

    def _write(self, view: LiveView) -> None:
        self._written_s = time.monotonic()
        try:
            write_ephemeral(join(self._run.folder, LIVE), view.model_dump_json() + "\n", retries=ONE_TRY)
        except StorageError as error:
            if not self._has_warned:
                logger.warning("%s; `papilio status` shows an old view, training goes on", error)
            self._has_warned = True

    def _make_view(
        self, status: RunStatus, heartbeats: Mapping[int, Heartbeat], now_s: float, state: JobState, error: str | None
    ) -> LiveView:
        first, earlier = self._looks[0]
        num_steps, train_s = status.step - first.step, status.train_s - first.train_s
        is_measured = num_steps > 0 and train_s > 0
        step_s = train_s / num_steps if is_measured else math.nan
        unresponsive_s = {rank: now_s - seen_s for rank, (_, seen_s) in self._seen.items()}
        view = LiveView(
            unix_s=time.time(),
            interval_s=self.interval_s,
            name=self._run.name,
            state=state,
            error=error,
            world_size=self._run.world_size,
            step=status.step,
            num_steps=status.num_steps,
            epoch=status.epoch,
            num_epochs=status.num_epochs,
            epoch_share=status.epoch_share,
            samples_per_s=(status.num_samples - first.num_samples) / train_s if is_measured else None,
            step_ms=1e3 * step_s if is_measured else None,
            remaining_s=step_s * (status.num_steps - status.step) if is_measured else None,
            loss=None if math.isnan(status.loss) else status.loss,
            validation_auc=status.validation_auc,
            checkpoint=status.checkpoint,
            ranks=tuple(
                _rank_view(heartbeat, earlier.get(rank), unresponsive_s[rank])
                for rank, heartbeat in sorted(heartbeats.items())
            ),
            findings=(
                *(AlertView(**asdict(alert)) for alert in self._detector.alerts),
                *(AlertView(kind=MODEL, ranks=(), host="", text=text) for text in status.alerts),
            ),
        )
        # Nobody knows how long the others will wait.
        return view.model_copy(update={"remaining_s": None}) if view.unresponsive() else view


def format_progress_note(view: LiveView) -> str:
    """Format the age of the checkpoint, where it is minutes, and the slowest rank, where the step feels it."""
    parts = []
    slowest = slowest_rank(view)
    if slowest is not None:
        rank, behind_ms = slowest
        parts.append(f"slowest rank {rank.rank} ({rank.host}) by {behind_ms:.1f} ms")
    age_s = 0.0 if view.checkpoint is None else view.unix_s - view.checkpoint.unix_s
    if age_s >= MIN_CHECKPOINT_AGE_S:
        parts.append(f"saved {age_s / 60:.0f} min ago")
    return "".join(f"{text}  " for text in parts)


def slowest_rank(view: LiveView) -> tuple[RankView, float] | None:
    """Return the rank that takes longest for its own work and by how much, against the median; None if not worth it."""
    own_ms = {rank.rank: view.own_ms(rank) for rank in view.ranks}
    if len(own_ms) < 2 or view.step_ms is None:
        return None
    slowest = max(view.ranks, key=lambda rank: own_ms[rank.rank])
    others = statistics.median(found for rank, found in own_ms.items() if rank != slowest.rank)
    behind_ms = own_ms[slowest.rank] - others
    return (slowest, behind_ms) if behind_ms >= BEHIND_SHARE * view.step_ms else None


def _states(heartbeats: Mapping[int, Heartbeat]) -> dict[int, RankState]:
    return {rank: RankState(s.host, s.step, s.figures) for rank, s in heartbeats.items() if s.figures is not None}


def _rank_view(heartbeat: Heartbeat, earlier: Heartbeat | None, unresponsive_s: float) -> RankView:
    figures, before = heartbeat.figures, earlier.figures if earlier is not None else None
    wait_share = None
    if figures is not None and before is not None and figures.train_s > before.train_s:
        wait_share = (figures.wait_s - before.wait_s) / (figures.train_s - before.train_s)
    return RankView(
        rank=heartbeat.rank,
        host=heartbeat.host,
        step=heartbeat.step,
        phase=heartbeat.phase,
        lookup_ms=figures.lookup_ms if figures is not None else None,
        dense_ms=figures.dense_ms if figures is not None else None,
        wait_share=wait_share,
        silent_s=unresponsive_s,
    )
