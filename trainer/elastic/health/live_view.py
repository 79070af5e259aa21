"""The merged view of a running job, as it lies in its run folder: live.json. No torch."""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from papilio.data_pipeline.paths import join
from papilio.trainer.storage.api import exists, read_json

LIVE = "live.json"
LIVE_FORMAT_VERSION = 1
# A view that was to be rewritten so many times ago, and was not, is old: its job hangs, or was killed.
STALE_AFTER_INTERVALS = 3
# Beyond that, for writing, and for clocks of hosts that differ.
STALE_MARGIN_S = 5.0

# Ranks send a heartbeat a second; a busy store or host delays some.
UNRESPONSIVE_AFTER_S = 5.0

JobState = Literal["running", "done", "saved", "failed"]


class LiveViewError(ValueError):
    """There is no view to show; the message gives the reason."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RankView(_Section):
    """One rank. Times are medians of the latest timed steps, None before there is one.

    Attributes:
        wait_share: of its latest training time, waited for data.
        silent_s: since the latest heartbeat that rank 0 has read; the key is part of format version 1.
    """

    rank: int
    host: str
    step: int
    phase: str
    lookup_ms: float | None = None
    dense_ms: float | None = None
    wait_share: float | None = None
    silent_s: float = 0.0


class AlertView(_Section):
    """Why everyone waits, and for which ranks; or of kind "model", what is wrong with what it learns."""

    kind: str
    ranks: tuple[int, ...]
    host: str
    text: str


class CheckpointView(_Section):
    """The newest complete checkpoint: `unix_s` is when the state was copied that it holds."""

    name: str | None
    step: int
    unix_s: float


class LiveView(_Section):
    """All ranks of a job at one time.

    Attributes:
        unix_s: when this was written, by rank 0's clock, and `interval_s` after which the next one is.
        step_ms: latest training step, data wait included; `samples_per_s` likewise, over all ranks.
        epoch: the one being read, from 1, and `epoch_share` of it that was trained.
        error: what ended the job: the first failure, with its rank and host.
        findings: active alerts, under the key that format version 1 gave them.
    """

    format_version: int = LIVE_FORMAT_VERSION
    unix_s: float
    interval_s: float
    name: str
    state: JobState = "running"
    error: str | None = None
    world_size: int
    step: int
    num_steps: int
    epoch: int
    num_epochs: int
    epoch_share: float
    samples_per_s: float | None = None
    step_ms: float | None = None
    remaining_s: float | None = None
    loss: float | None = None
    validation_auc: float | None = None
    checkpoint: CheckpointView | None = None
    ranks: tuple[RankView, ...] = ()
    findings: tuple[AlertView, ...] = ()

    def own_ms(self, rank: RankView) -> float:
        """Return what a rank does of a step without the others, as far as it is measured."""
        return (rank.lookup_ms or 0.0) + (rank.dense_ms or 0.0) + (rank.wait_share or 0.0) * (self.step_ms or 0.0)

    def unresponsive(self) -> list[RankView]:
        """Return the ranks of a running job without a heartbeat for several seconds, for which all others wait."""
        longest_s = max(UNRESPONSIVE_AFTER_S, 2 * self.interval_s)
        is_running = self.state == "running"
        return [rank for rank in self.ranks if is_running and rank.phase != "done" and rank.silent_s >= longest_s]

    def age_s(self, now_unix_s: float | None = None) -> float:
        """Seconds since it was written."""
        return max(0.0, (time.time() if now_unix_s is None else now_unix_s) - self.unix_s)

    def is_stale(self, now_unix_s: float | None = None) -> bool:
        """Whether its job is marked as running and yet does not write."""
        longest_s = STALE_AFTER_INTERVALS * self.interval_s + STALE_MARGIN_S
        return self.state == "running" and self.age_s(now_unix_s) > longest_s


def read_view(run_dir: str) -> LiveView:
    """Read the view of a run.

    Raises:
        LiveViewError: there is none, or another version of Papilio wrote it.
        StorageError: it could not be read.
    """
    path = join(run_dir, LIVE)
    if not exists(path):
        if not exists(join(run_dir, "config.json")):
            raise LiveViewError(f"{run_dir} is not a run folder; give the folder that training printed, or a job")
        raise LiveViewError(f"{run_dir} has no {LIVE} yet: its job has not begun to train")
    tree: Any = read_json(path)
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version != LIVE_FORMAT_VERSION:
        raise LiveViewError(f"{path} has format version {version}; this Papilio reads {LIVE_FORMAT_VERSION}")
    try:
        return LiveView.model_validate(tree)
    except ValidationError as error:
        raise LiveViewError(f"{path} is damaged: {error.errors()[0]['loc']} {error.errors()[0]['msg']}") from error
