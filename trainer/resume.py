"""Where a run begins: at the start, or where the newest complete checkpoint of its folder stands."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from data_pipeline.paths import join
from data_pipeline.version import papilio_version
from trainer.checkpoint.compatibility import safe_changes
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.format import CheckpointError, DamagedError, Marker
from trainer.checkpoint.loading import load_newest
from trainer.checkpoint.policy import RunIdentity
from trainer.checkpoint.saver import Saved
from trainer.config import Config
from trainer.optimizers import Optimizers
from trainer.ranks import Ranks
from trainer.run_folder import read_run
from trainer.run_lock import LockedError, RunLock, job_name
from trainer.run_progress import Progress
from trainer.sharded_model import ShardedModel
from trainer.storage import StorageError, exists, remove_folder, require_writable

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


def check_can_go_on(folder: CheckpointFolder, run_dir: str, identity: RunIdentity, ranks: Ranks) -> None:
    """Check, before anything is allocated, that this job is the one that the folders hold, if any. Collective.

    Raises:
        CheckpointError: it is another; lists the differences. Or its checkpoints are of another version.
        StorageError: a folder cannot be written.
    """
    problem: Exception | None = None
    if ranks.is_first:
        try:
            _check_identity(folder, run_dir, identity)
            _check_writable(run_dir, folder.path)
        except (CheckpointError, OSError) as error:
            problem = error
    problem = ranks.agree_on(problem)
    if problem is not None:
        raise problem


def go_on(folder: CheckpointFolder, config: Config, model: ShardedModel, optimizers: Optimizers, ranks: Ranks) -> Start:
    """Load the newest complete checkpoint, if there is one, and sweep what was never completed. Collective."""
    marker = load_newest(folder, model, optimizers, ranks)
    if ranks.is_first:
        for name in folder.sweep():
            logger.info("removed %s, which was never completed", join(folder.path, name))
    now = {"world_size": ranks.world_size, "papilio_version": papilio_version()}
    if marker is None:
        return Start(Progress(history=[{"step": 0, **now, "changes": {}}]))
    progress = Progress.from_dict(marker.progress)
    changed = safe_changes(marker.config, config.model_dump(mode="json"), {}, {}, folder.path)
    progress.history.append({"step": marker.step, **now, "changes": changed})
    if ranks.is_first:
        print(_resuming(marker, changed, ranks), flush=True)
    saved = Saved("", marker.step, unix_s=datetime.fromisoformat(marker.saved_at).timestamp())
    return Start(progress, marker.progress["window"], saved)


def _check_writable(*paths: str) -> None:
    """Try to write; what fails after this, like a wrong recipe, finds no new folder left behind."""
    new = [path for path in paths if not exists(path)]
    for path in paths:
        require_writable(path)
    for path in new:
        remove_folder(path)


def _check_identity(folder: CheckpointFolder, run_dir: str, identity: RunIdentity) -> None:
    found = _newest_readable(folder)
    if found is not None:
        config, data, where = found.config, found.data, f"the run in {folder.path}"
    elif exists(join(run_dir, "config.json")):
        config, data = read_run(run_dir)
        where = f"the run in {run_dir}"
    else:
        return
    safe_changes(config, identity.config, data, identity.data, where)


def _newest_readable(folder: CheckpointFolder) -> Marker | None:
    for name in reversed(folder.committed_names()):
        try:
            return folder.read_marker(name)
        except DamagedError:
            continue  # said when it is loaded
    return None


def _resuming(marker: Marker, changed: Mapping[str, tuple[Any, Any]], ranks: Ranks) -> str:
    lines = [f"going on after step {marker.step:,}, saved {marker.saved_at} ({marker.saved_for})"]
    if marker.world_size != ranks.world_size:
        lines[0] += f" on {marker.world_size} rank(s)"
    lines += [f"  changed: {key} = {new}, was {old}" for key, (old, new) in changed.items()]
    return "\n".join(lines)
