"""Loads a checkpoint into a sharded model, whatever plan and number of ranks saved it."""

from __future__ import annotations

import logging
import warnings

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from papilio.data_pipeline.paths import join
from papilio.trainer.checkpoint.dcp_storage import PartFileReader
from papilio.trainer.checkpoint.folder import CheckpointFolder, is_unreachable
from papilio.trainer.checkpoint.format import CheckpointError, DamagedError, Marker, copy_folder
from papilio.trainer.checkpoint.model_state import LoadTargets, set_step
from papilio.trainer.checkpoint.pieces import PiecesLoadPlanner
from papilio.trainer.optimizers import Optimizers
from papilio.trainer.process_group import Ranks
from papilio.trainer.sharded_model import ShardedModel
from papilio.trainer.storage.retries import StorageError

logger = logging.getLogger(__name__)


def load_newest(
    folder: CheckpointFolder, model: ShardedModel, optimizers: Optimizers | None, ranks: Ranks
) -> tuple[str, Marker] | None:
    """Load the newest complete checkpoint, or where it is damaged or cannot be read the one before. Collective.

    Returns:
        Its name and marker; None if there is none.

    Raises:
        CheckpointError: it is of another version, another model, or all of them are damaged.
    """
    names = ranks.ask_first(folder.committed_names)
    damaged: list[str] = []
    for name in reversed(names):
        try:
            return name, load(folder, name, model, optimizers, ranks)
        except DamagedError as error:
            damaged.append(str(error))
            folder.unusable.add(name)
            if ranks.is_first:
                logger.warning("checkpoint %s cannot be used and is left out: %s", name, error)
    if damaged:
        raise CheckpointError(
            f"all {len(damaged)} checkpoint(s) in {folder.path} are damaged or cannot be read, the newest: "
            f"{damaged[0]}; restore one from a backup, or choose another output.run_dir to start anew"
        )
    return None


def load(
    folder: CheckpointFolder, name: str, model: ShardedModel, optimizers: Optimizers | None, ranks: Ranks
) -> Marker:
    """Load one checkpoint in place, without `optimizers` the weights alone. Collective.

    Raises:
        DamagedError: its bytes are not those that were written, or cannot be read; the model is half loaded.
        CheckpointError: it is of another version, another model, or holds independent tables of another number of
            groups.
    """
    problem: CheckpointError | StorageError | None = None
    marker, targets = None, None
    try:
        marker = folder.read_marker(name)
        copy = _copy_of(folder, name, marker, model)
        index = folder.read_index(name, marker, copy)
        targets = LoadTargets(model.module, optimizers, index)
    except (CheckpointError, StorageError) as error:
        problem = error
    _raise_together(problem, ranks)
    assert marker is not None and targets is not None
    reader = PartFileReader(copy_folder(join(folder.path, name), copy, marker.num_copies), index)
    planner = PiecesLoadPlanner()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(dict(targets.tensors), storage_reader=reader, planner=planner, process_group=model.shard_group)
    except CheckpointException as failed:
        causes = [cause for cause, _ in failed.failures.values()]
        problem = next(
            (_as_problem(cause) for cause in causes if isinstance(cause, CheckpointError | StorageError)), None
        )
        if problem is None:
            raise
    _raise_together(problem, ranks)
    targets.finish()
    if optimizers is not None:
        set_step(model.module, optimizers, marker.step)
        _warn_of_regrouping(targets.regrouped, ranks)
    return marker


def _copy_of(folder: CheckpointFolder, name: str, marker: Marker, model: ShardedModel) -> int:
    if marker.num_copies > 1 and marker.num_copies != model.num_copies:
        raise CheckpointError(
            f"{join(folder.path, name)} holds the independent tables of {marker.num_copies} groups, this job has "
            f"{model.num_copies}; set sharding.replicas.num_groups = {marker.num_copies} and independent_tables = true "
            f"on a multiple of {marker.num_copies} ranks"
        )
    return model.group_index if marker.num_copies > 1 else 0


def _as_problem(cause: CheckpointError | StorageError) -> CheckpointError | StorageError:
    """A part file that cannot be read is a damaged one."""
    is_file = isinstance(cause, StorageError) and not is_unreachable(cause)
    return DamagedError(str(cause)) if is_file else cause


def _raise_together(problem: CheckpointError | StorageError | None, ranks: Ranks) -> None:
    """Raise on every rank what any rank found, so that none waits for it."""
    found = ranks.gather(problem)
    for error in found:
        if error is not None:
            raise error


def _warn_of_regrouping(tables: list[str], ranks: Ranks) -> None:
    regrouped = sorted({table for of_rank in ranks.gather(tables) for table in of_rank})
    if regrouped and ranks.is_first:
        logger.warning(
            "%d table(s) are cut into other blocks of columns than in the checkpoint (%s%s): their row-wise optimizer "
            "state was merged by weighted means or copied to each part. Weights are exact; from here on row-wise "
            "optimizers train these tables otherwise than they would have under the old plan",
            len(regrouped),
            ", ".join(regrouped[:3]),
            ", ..." if len(regrouped) > 3 else "",
        )
