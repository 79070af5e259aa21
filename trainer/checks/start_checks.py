"""What can be known of a training before any rank runs: refused here, with the key that fixes it. Needs no torch.

`papilio train` asks before it starts processes; rank 0 asks again, for jobs that came another way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from papilio.data_pipeline.dataset import Dataset, open_dataset
from papilio.data_pipeline.manifest import DatasetError
from papilio.data_pipeline.paths import join
from papilio.sharding.config import ReplicasConfig
from papilio.sharding.hardware import load_hardware
from papilio.sharding.plan_file import read_plan_file
from papilio.trainer.checkpoint.compatibility import safe_changes
from papilio.trainer.checkpoint.config import CheckpointConfig
from papilio.trainer.checkpoint.folder import CheckpointFolder, Committed
from papilio.trainer.checkpoint.format import DamagedError
from papilio.trainer.checkpoint.selection import LATEST, find_checkpoint
from papilio.trainer.checks.same_data import check_data_of_run
from papilio.trainer.config import Config
from papilio.trainer.config_file import ConfigError
from papilio.trainer.run.folder import SUMMARY, checkpoints_dir, data_identity, load_run_config, read_run
from papilio.trainer.storage.api import exists, read_json, require_writable
from papilio.trainer.storage.retries import StorageError


@dataclass(frozen=True)
class FinishedRun:
    """A run that has nothing left to train, with what its summary.json says."""

    run_dir: str
    summary: dict[str, Any]

    def __str__(self) -> str:
        return (
            f"the run in {self.run_dir} is finished ({self.summary['num_steps']:,} steps); nothing was changed. To "
            "train it further, raise --train.epochs or --train.max_steps; to begin anew, give another --output.run_dir"
        )


def open_run_data(config: Config) -> Dataset:
    """Open the data set of a run, and check that it has what the run needs.

    Raises:
        DatasetError: it cannot be read, lacks rows to train on, or a shard is missing or cut short.
        ConfigError: a setting needs rows that it lacks.
    """
    try:
        dataset = open_dataset(config.data.path, verify_checksums=config.data.verify_checksums)
        dataset.open_split("train")
        dataset.require_dense_columns()
        for split in filter(dataset.has_rows, dataset.manifest.splits):
            _check_shards(dataset, split)
    except DatasetError as error:
        raise DatasetError(f"data.path: {error}; or name another with --data.path=DIR") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(
            f"data.path = {config.data.path} cannot be read: {reason}; name a data set with --data.path=DIR"
        ) from None
    every = config.train.evaluate_every_steps
    if every is not None and not dataset.has_rows("validation"):
        raise ConfigError(
            f"train.evaluate_every_steps = {every}, but data set {dataset.folder} has no rows in split 'validation' "
            f"(split rule: {dataset.manifest.split_rule}); leave it out (--train.evaluate_every_steps=none), or "
            "preprocess again with a validation split"
        )
    return dataset


def without_validation(dataset: Dataset, checkpoint: CheckpointConfig) -> str | None:
    """Say what a run goes without where the data set has no validation rows; None where it has some."""
    if dataset.has_rows("validation"):
        return None
    kept = f"the newest {checkpoint.keep_last} checkpoint(s) are kept (checkpoint.keep_last)"
    best = f"; none is the best, {kept}" if checkpoint.keep_best else ""
    return f"data set {dataset.folder} has no rows in split validation: nothing measures what the model learns{best}"


def check_run(config: Config, dataset: Dataset, run_dir: str) -> FinishedRun | None:
    """Check that this job is the one that its folders hold, if any; return it if it has nothing left to do.

    Raises:
        CheckpointError: it is another; lists the differences. Or its checkpoints are of another version.
        ConfigError: a folder cannot be read or written, or its config is damaged.
        StorageError: the storage does not answer, or is full.
    """
    places = _places(config, run_dir)
    key, path = list(places.items())[-1]
    with _naming(key, path):
        folder = CheckpointFolder(checkpoints_dir(run_dir, config.checkpoint))
        newest = _check_identity(folder, run_dir, config, dataset)
        finished = None if newest is None else _finished(folder, newest, config, run_dir)
    if finished is None:
        _check_writable(places)
    return finished


def check_input(config: Config) -> Dataset:
    """Check what a run reads; nothing is written, so that every rank may ask. Returns the data set.

    Raises:
        ConfigError, DatasetError, HardwareError, PlanFileError: it cannot be used.
    """
    dataset = open_run_data(config)
    if config.sharding.plan is not None:
        read_plan_file(config.sharding.plan)
    if config.sharding.hardware is not None:
        load_hardware(config.sharding.hardware)
    return dataset


def check_start(config: Config) -> FinishedRun | None:
    """Check all that is known before the ranks start, cheapest first; return the run if it is finished.

    Raises:
        CheckpointError, ConfigError, DatasetError, HardwareError, PlanFileError, StorageError: it would fail.
    """
    dataset = check_input(config)
    if config.output.run_dir is not None:
        return check_run(config, dataset, config.output.run_dir)
    _check_writable(_places(config, None))
    return None


def check_evaluation(run_dir: str, data: str | None, split: str, checkpoint: str, num_ranks: int) -> None:
    """Check all that is known of an evaluation before it starts: the run, one of its checkpoints, the data set's rows.

    Raises:
        CheckpointError, ConfigError, DatasetError, HardwareError, StorageError: it would fail.
    """
    config = load_run_config(run_dir)
    check_num_ranks(config.sharding.replicas, run_dir, num_ranks)
    folder = CheckpointFolder(checkpoints_dir(run_dir, config.checkpoint))
    name = find_checkpoint(folder, checkpoint)
    dataset = open_dataset(data or config.data.path, verify_checksums=False)
    dataset.open_split(split)
    check_data_of_run(dataset, read_run(run_dir)[1], run_dir)
    _check_shards(dataset, split)
    if config.sharding.hardware is not None:
        load_hardware(config.sharding.hardware)
    # Should the latest be damaged, the one before is taken.
    _check_readable(folder, folder.committed_names() if checkpoint == LATEST else [name])


def check_num_ranks(replicas: ReplicasConfig, run_dir: str, num_ranks: int) -> None:
    """Check that each group with independent tables gets as many ranks as the others.

    Raises:
        ConfigError: the groups do not divide the ranks.
    """
    if replicas.independent_tables and num_ranks % replicas.num_groups:
        raise ConfigError(
            f"{run_dir} holds independent tables of {replicas.num_groups} groups, which cannot share {num_ranks} "
            f"rank(s) evenly; give --nproc {replicas.num_groups} or a multiple of it"
        )


def _check_readable(folder: CheckpointFolder, names: Sequence[str]) -> None:
    """Check that marker and index of one of the checkpoints can be read, the newest that will do.

    Raises:
        DamagedError: of the newest, where none can.
    """
    problems = []
    for name in reversed(names):
        try:
            folder.read_index(name, folder.read_marker(name))
        except DamagedError as error:
            problems.append(error)
        else:
            return
    raise problems[0]


def _places(config: Config, run_dir: str | None) -> dict[str, str]:
    """Return the folders that a run writes to, by key; `run_dir` is None where a new folder will be made."""
    key, folder = ("output.runs_dir", config.output.runs_dir) if run_dir is None else ("output.run_dir", run_dir)
    return {key: folder} | ({"checkpoint.folder": config.checkpoint.folder} if config.checkpoint.folder else {})


def _check_writable(places: Mapping[str, str]) -> None:
    """Try to write; what fails after this, like a wrong recipe, leaves no new folder behind."""
    new = [path for path in places.values() if not _is_there(path)]
    try:
        for key, path in places.items():
            with _naming(key, path):
                require_writable(path)
    finally:
        # Only if empty: another job may have begun there meanwhile. Object storage keeps no empty folders.
        for path in reversed(new):
            with suppress(OSError):
                os.rmdir(path.removeprefix("file://"))


@contextmanager
def _naming(key: str, path: str) -> Iterator[None]:
    """Name the key of a folder that cannot be used, now or later.

    Raises:
        ConfigError: it cannot.
        StorageError: the storage does not answer, or is full.
    """
    try:
        yield
    except StorageError as error:
        if error.is_passing:
            raise
        raise ConfigError(f"{key} = {path}: {error}") from None


def _check_shards(dataset: Dataset, split: str) -> None:
    """Look at the size of every shard on a disk; its bytes are checked when it is opened."""
    for shard in dataset.manifest.splits[split].shards:
        path = join(dataset.folder, shard.file)
        if "://" in path:
            continue
        found = os.stat(path).st_size if os.path.exists(path) else None
        if found != shard.num_bytes:
            what = "is missing" if found is None else f"has {found:,} bytes, not {shard.num_bytes:,}"
            raise DatasetError(f"shard {path} {what}; restore it or preprocess the data again")


def _is_there(path: str) -> bool:
    try:
        return exists(path)
    except StorageError:
        return True  # whatever is wrong with it is said by writing


def _check_identity(folder: CheckpointFolder, run_dir: str, config: Config, dataset: Dataset) -> Committed | None:
    """Return the newest checkpoint whose marker can be read."""
    found = _newest_readable(folder)
    if found is not None:
        old_config, old_data, where = found.marker.config, found.marker.data, f"the run in {folder.path}"
    elif _is_there(join(run_dir, "config.json")):
        old_config, old_data = read_run(run_dir)
        where = f"the run in {run_dir}"
    else:
        return None
    safe_changes(old_config, config.model_dump(mode="json"), old_data, data_identity(dataset), where)
    return found


def _newest_readable(folder: CheckpointFolder) -> Committed | None:
    for name in reversed(folder.committed_names()):
        try:
            return Committed(name, folder.read_marker(name))
        except DamagedError:
            continue  # said when it is loaded
    return None


def _finished(folder: CheckpointFolder, newest: Committed, config: Config, run_dir: str) -> FinishedRun | None:
    """A run is finished once the summary of its last step is written, as long as its last checkpoint is whole.

    All of it is read, as it would be to resume: where it is damaged, the last steps can be trained again.
    """
    marker, most = newest.marker, config.train.max_steps
    if marker.progress["position"]["epoch"] < config.train.epochs and (most is None or marker.step < most):
        return None
    try:
        summary = read_json(join(run_dir, SUMMARY))
    except StorageError:
        return None
    if not isinstance(summary, dict) or summary.get("num_steps") != marker.step or not _is_summary(summary):
        return None
    is_whole = all(problem is None for _, _, problem in folder.verify(newest.name))
    return FinishedRun(run_dir, summary) if is_whole else None


def _is_summary(tree: dict[str, Any]) -> bool:
    """Whether `Summary.from_dict` can read it."""
    final = tree.get("final")
    are_metrics = isinstance(final, dict) and all(isinstance(values, dict) for values in final.values())
    return type(tree["num_steps"]) is int and are_metrics and isinstance(tree.get("findings"), list)
