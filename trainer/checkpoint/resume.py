"""Where a run begins: at the start, or where the newest complete checkpoint of its folder stands."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from papilio.data_pipeline.paths import join
from papilio.data_pipeline.version import papilio_version
from papilio.trainer.checkpoint.compatibility import safe_changes
from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.checkpoint.format import Marker
from papilio.trainer.checkpoint.loader import load_newest
from papilio.trainer.checkpoint.saver import Saved
from papilio.trainer.optimizers import Optimizers
from papilio.trainer.process_group import Ranks
from papilio.trainer.run.lock import LockedError, RunLock, job_name
from papilio.trainer.run_state import Progress
from papilio.trainer.sharded_model import ShardedModel
from papilio.trainer.storage.api import StorageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where to begin: from which checkpoint, if any, and with which sums of losses since the last report."""

    progress: Progress
    window: list[list[float]] | None = None
    saved: Saved | None = None


def lock_folders(folders: Sequence[str], ranks: Ranks) -> RunLock | None:
    """Keep other jobs out of these folders; the first rank holds the lock, the others get None. Collective.

    Raises:
        LockedError: another job is in one of them.
        StorageError: a folder cannot be written.
    """
    lock: RunLock | None = None
    problem: Exception | None = None
    if ranks.is_first:
        try:
            lock = RunLock(folders, job_name(), partial(print, file=sys.stderr, flush=True))
        except (LockedError, StorageError) as error:
            problem = error
    problem = ranks.agree_on(problem)
    if problem is not None:
        raise problem
    return lock


def resume(
    folder: CheckpointFolder,
    settings: Mapping[str, Any],
    model: ShardedModel,
    optimizers: Optimizers,
    ranks: Ranks,
) -> Start:
    """Load the newest complete checkpoint, if there is one, and remove what was never completed. Collective.

    Args:
        folder: where the checkpoints lie.
        settings: the run's config as plain values; what it changes of the checkpoint's is printed and kept.
        model: filled in place.
        optimizers: filled in place.
        ranks: all of the job.
    """
    found = load_newest(folder, model, optimizers, ranks)
    if ranks.is_first:
        for name in folder.sweep():
            logger.info("removed %s, which was never completed", join(folder.path, name))
    now = {"world_size": ranks.world_size, "papilio_version": papilio_version()}
    if found is None:
        return Start(Progress(history=[{"step": 0, **now, "changes": {}}]))
    name, marker = found
    progress = Progress.from_dict(marker.progress)
    changed = safe_changes(marker.config, dict(settings), {}, {}, folder.path)
    progress.history.append({"step": marker.step, **now, "changes": changed})
    if ranks.is_first:
        print(_resuming(marker, changed, ranks), flush=True)
    saved = Saved(name, marker.step, unix_s=datetime.fromisoformat(marker.saved_at).timestamp())
    return Start(progress, marker.progress["window"], saved)


def _resuming(marker: Marker, changed: Mapping[str, tuple[Any, Any]], ranks: Ranks) -> str:
    lines = [f"resuming from step {marker.step:,}, saved {marker.saved_at} ({marker.saved_for})"]
    if marker.world_size != ranks.world_size:
        lines[0] += f" on {marker.world_size} rank(s)"
    lines += [f"  changed: {key} = {new}, was {old}" for key, (old, new) in changed.items()]
    return "\n".join(lines)
