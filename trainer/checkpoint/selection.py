"""Which checkpoints a command line means: RUN is a folder of several kinds, NAME a name, a step, or a role.

Needs no torch.
"""

from __future__ import annotations

import difflib
import logging
from typing import Any

from papilio.data_pipeline.paths import join
from papilio.trainer.checkpoint.folder import CheckpointFolder, Committed, best_of
from papilio.trainer.checkpoint.format import MARKER, STEP_FOLDER, CheckpointError
from papilio.trainer.storage.api import StorageError, exists, list_folder, read_json

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
# A package has a config, too, that of its run.
PACKAGE = "package.json"
LATEST, BEST = "latest", "best"
MAX_NAMED = 5
MAX_DIGITS = 100  # of a step, leading zeros included


class NoRunError(CheckpointError):
    """A path that leads to no run and to no checkpoints."""


def find_folder(run: str) -> CheckpointFolder:
    """Return the folder of a run's checkpoints; `run` is the run's folder, or that of the checkpoints itself.

    Raises:
        NoRunError: it is neither; names the runs near by.
    """
    run = run.rstrip("/") or "/"
    if exists(join(run, PACKAGE)):
        raise NoRunError(f"{run} is a package, not a run; `papilio package show {run}` says which run it was made of")
    if exists(join(run, CONFIG)):
        return CheckpointFolder(_configured(_config_of(run)) or join(run, CHECKPOINTS))
    names = list_folder(run)
    if any(STEP_FOLDER.fullmatch(name) for name in names):
        return CheckpointFolder(run)
    if CHECKPOINTS in names:
        return CheckpointFolder(join(run, CHECKPOINTS))
    if exists(join(run, MARKER)):
        parent, _, name = run.rpartition("/")
        raise NoRunError(f"{run} is one checkpoint; write {parent or '.'} {name}")
    raise NoRunError(_no_run(run, is_there=bool(names)))


def find_checkpoint(folder: CheckpointFolder, word: str) -> str:
    """Return the name of the complete checkpoint that a word means: its name or the beginning, its step, a role.

    Raises:
        CheckpointError: there is none such.
    """
    names = folder.committed_names()
    if not names:
        raise CheckpointError(_none_complete(folder))
    if word == LATEST:
        return names[-1]
    if word == BEST:
        return _best_name(folder)
    if word in names:
        return word
    if word in folder.names():
        raise CheckpointError(
            f"{join(folder.path, word)} was never completed (it has no {MARKER}): it is being saved now, or its save "
            "was cut off"
        )
    step = int(word) if word.isdecimal() and len(word) <= MAX_DIGITS else None
    meant = [name for name in names if name.startswith(word) or _step(name) == step]
    if len(meant) == 1 or (meant and step is not None):
        return meant[-1]
    nearest = meant or difflib.get_close_matches(word, names, 1) or names[-MAX_NAMED:]
    hint = f"did you mean {nearest[0]}?" if len(nearest) == 1 else f"there are {_listed(nearest)}"
    shown = word[:99] if word.isprintable() and word.strip() else repr(word[:99])
    raise CheckpointError(f"there is no checkpoint {shown} in {folder.path}; {hint}")


def complete_ones(folder: CheckpointFolder) -> list[Committed]:
    """Return the complete checkpoints, oldest first.

    Raises:
        CheckpointError: there is none.
    """
    committed = folder.committed()
    if not committed:
        raise CheckpointError(_none_complete(folder))
    return committed


def _best_name(folder: CheckpointFolder) -> str:
    best = best_of(folder.committed())
    if best is None:
        raise CheckpointError(
            f"no checkpoint in {folder.path} was validated at its own step, so none is the best; name one, or latest"
        )
    return best.name


def _none_complete(folder: CheckpointFolder) -> str:
    incomplete = len(folder.names())
    found = f"{incomplete} incomplete" if incomplete else "none at all"
    return f"{folder.path} holds no complete checkpoint ({found}); the config's checkpoint.every_steps makes them"


def _config_of(run: str) -> Any:
    """Read a run's config; where it cannot be read, its checkpoints can still be found in the run's own folder."""
    try:
        return read_json(join(run, CONFIG))
    except StorageError as error:
        if CHECKPOINTS not in list_folder(run):
            raise
        logger.warning("%s; taking the checkpoints in %s", error, join(run, CHECKPOINTS))
        return None


def _configured(config: Any) -> str | None:
    """Folder of the checkpoints where the run's config names one."""
    section = config.get("checkpoint") if isinstance(config, dict) else None
    return section.get("folder") if isinstance(section, dict) else None


def _step(name: str) -> int:
    return int(name[len("step_") :].partition("-")[0])


def _no_run(run: str, *, is_there: bool) -> str:
    if is_there:
        inside = _runs_in(run)
        if inside:
            return f"{run} is a folder of runs; give one of them: {_listed([join(run, name) for name in inside])}"
        wrong = f"{run} is no run folder: it has neither {CONFIG} nor checkpoints"
    else:
        wrong = f"{run} does not exist" if not exists(run) else f"{run} is empty, or a file"
    parent, slash, base = run.rpartition("/")
    parent = parent if slash else "."
    near = _runs_in(parent)
    if not near:
        return f"{wrong}; give the folder that `papilio train` printed"
    nearest = difflib.get_close_matches(base, near, 1) or near
    paths = [join(parent, name) if slash else name for name in nearest]
    return f"{wrong}; " + (f"did you mean {paths[0]}?" if len(paths) == 1 else f"near by are {_listed(paths)}")


def _runs_in(folder: str) -> list[str]:
    try:
        return [name for name in list_folder(folder) if _is_run(join(folder, name))]
    except OSError:  # forbidden, or a file
        return []


def _listed(names: list[str]) -> str:
    """The last of these, which are the newest."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[-MAX_NAMED:]) + more


def _is_run(folder: str) -> bool:
    return exists(join(folder, CONFIG)) and not exists(join(folder, PACKAGE))
