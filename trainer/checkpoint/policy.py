"""When a run saves, and what its checkpoints say."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from papilio.data_pipeline.version import papilio_version
from papilio.trainer.checkpoint.config import CheckpointConfig
from papilio.trainer.checkpoint.format import Marker
from papilio.trainer.checkpoint.saver import Saved, Saver
from papilio.trainer.process_group import Ranks


@dataclass(frozen=True)
class RunIdentity:
    """What every checkpoint of a run says alike: see `Marker`."""

    config: Mapping[str, Any]
    data: Mapping[str, Any]
    versions: Mapping[str, str]


class Checkpoints:
    """Saves the checkpoints of a run as its config asks. Collective, like the saver."""

    def __init__(self, saver: Saver, config: CheckpointConfig, identity: RunIdentity, ranks: Ranks) -> None:
        self._saver = saver
        self._config = config
        self._identity = identity
        self._ranks = ranks
        self._latest_s = time.monotonic()
        self._latest_step = saver.latest.step if saver.latest is not None else None

    def due(self, step: int, *, is_report: bool, is_best: bool) -> str | None:
        """Return why to save after this step, the same on all ranks, or None.

        Args:
            step: steps done.
            is_report: the ranks have just met for a report, so that asking rank 0 for the time costs little.
            is_best: this step's validation is the best so far.
        """
        self._saver.check(wait=False)
        if is_best and self._config.keep_best:
            return "best"
        if self._config.every_steps is not None and step % self._config.every_steps == 0:
            return "every_steps"
        if self._config.every_minutes is not None and is_report:
            is_late = time.monotonic() - self._latest_s >= 60 * self._config.every_minutes
            return "every_minutes" if self._ranks.agree_on(is_late) else None
        return None

    def save(self, step: int, progress: dict[str, Any], saved_for: str, *, wait: bool = False) -> None:
        """Save, unless the latest checkpoint is of this very step.

        Raises:
            SaveError: with `wait`, it could not be written.
        """
        if self.is_saved(step):
            self._saver.check(wait=wait, reraise=wait)
            return
        marker = Marker(
            papilio_version=papilio_version(),
            step=step,
            saved_at="",
            saved_for=saved_for,
            num_copies=self._saver.num_copies,
            world_size=self._ranks.world_size,
            files={},
            progress=progress,
            config=dict(self._identity.config),
            data=dict(self._identity.data),
            versions=dict(self._identity.versions),
        )
        self._saver.save(marker, wait=wait)
        self._latest_step, self._latest_s = step, time.monotonic()

    def is_saved(self, step: int) -> bool:
        """Whether the newest save is of this step."""
        return self._latest_step == step

    def amend(self, progress: dict[str, Any]) -> None:
        """Write into the newest checkpoint what was measured after it was saved; not collective: rank 0 does."""
        if self._ranks.is_first:
            self._saver.amend(progress)

    @property
    def latest(self) -> Saved | None:
        """The newest complete checkpoint."""
        return self._saver.latest

    @property
    def stalls_s(self) -> list[float]:
        """How long training waited for each save."""
        return self._saver.stalls_s
