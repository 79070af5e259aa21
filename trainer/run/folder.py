"""The run folder: everything that says what a run was, and what came of it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

from papilio.data_pipeline.dataset import Dataset
from papilio.trainer.checkpoint.config import CheckpointConfig
from papilio.trainer.config import Config, OutputConfig
from papilio.trainer.config_file import ConfigError, build_config
from papilio.trainer.run.metrics_file import metrics_line, open_metrics
from papilio.trainer.run.tensorboard_file import EventsFile
from papilio.trainer.storage.api import exists, list_folder, make_folder, read_json, write_json, write_text
from papilio.trainer.storage.retries import StorageError

logger = logging.getLogger(__name__)

RUN_FORMAT_VERSION = 1
JOB = "job.json"
SUMMARY = "summary.json"


def choose_run_dir(config: OutputConfig, name: str) -> str:
    """Return the folder of this run: the one named in the config, that of the same elastic job, or a new one.

    torchrun starts the ranks of a job anew after a failure, with the job's id the same and the time another one.
    """
    if config.run_dir is not None:
        return config.run_dir
    job_id = _job_id()
    for folder in sorted(list_folder(config.runs_dir), reverse=True) if job_id else ():
        path = os.path.join(config.runs_dir, folder, JOB)
        if folder.startswith(f"{name}-") and _job_of(path) == job_id:
            return os.path.join(config.runs_dir, folder)
    path = os.path.join(config.runs_dir, f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}")
    # Two jobs may begin in the same second.
    return next(free for free in (path, *(f"{path}-{number}" for number in range(2, 1_000))) if not exists(free))


def _job_of(path: str) -> str | None:
    """Id of the job that a run was of; of other runs in the folder nothing is asked, not even to be whole."""
    try:
        tree = read_json(path) if exists(path) else None
    except StorageError:
        return None
    return tree.get("id") if isinstance(tree, dict) else None


def checkpoints_dir(run_dir: str, config: CheckpointConfig) -> str:
    """Return where a run's checkpoints lie."""
    return config.folder or os.path.join(run_dir, "checkpoints")


class RunFolder:
    """Writes a run's folder; only rank 0 has one. Measurements are appended as they come."""

    def __init__(
        self,
        path: str,
        config: Config,
        dataset: Dataset,
        versions: Mapping[str, str],
        step: int = 0,
        validated: Iterable[int] = (),
    ) -> None:
        """Begin a run, or resume one that has done `step` steps, and was `validated` after these.

        What was measured after them is dropped.
        """
        self.path = path
        make_folder(path)
        write_json(self.file("config.json"), {"format_version": RUN_FORMAT_VERSION, **config.model_dump(mode="json")})
        write_json(self.file("versions.json"), dict(versions))
        write_json(self.file("data.json"), data_identity(dataset))
        write_json(self.file(JOB), {"id": _job_id()})
        self._metrics = open_metrics(self.file("metrics.jsonl"), step, validated)
        self._events = EventsFile(self.file("tensorboard"), step) if config.output.tensorboard else None

    def file(self, name: str) -> str:
        """Path of a file of the folder."""
        return os.path.join(self.path, name)

    def write_plan(self, plan_json: str) -> None:
        """Keep the plan."""
        write_text(self.file("plan.json"), plan_json)

    def append(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl and a point to each of TensorBoard's curves; `kind` names the split or phase."""
        self._metrics.append(metrics_line(kind, step, values))
        if self._events is not None:
            self._events.append(kind, step, values)

    def write_summary(self, tree: dict[str, Any]) -> None:
        """Write summary.json, with which a run is finished; all else is saved, so that a failure is only logged."""
        try:
            write_json(self.file(SUMMARY), tree)
        except StorageError as error:
            logger.warning("%s; the run is trained and saved, the same command again sums it up", error)

    def close(self) -> None:
        """Finish the files that are open."""
        self._metrics.close()
        if self._events is not None:
            self._events.close()


def load_run_config(run_dir: str) -> Config:
    """Read the config of a run.

    Raises:
        ConfigError: the folder is not a run's, or another version of Papilio wrote it.
    """
    return build_config(_read_config(run_dir), source=os.path.join(run_dir, "config.json"))


def read_run(run_dir: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a run's config and the identity of its data set, as plain values.

    Raises:
        ConfigError: the folder is not a run's, or another version of Papilio wrote it.
    """
    return _read_config(run_dir), _read_tree(os.path.join(run_dir, "data.json"))


def _read_config(run_dir: str) -> dict[str, Any]:
    path = os.path.join(run_dir, "config.json")
    if not exists(path):
        raise ConfigError(
            f"{run_dir} is not a run folder: it has no config.json; give the folder that training printed"
        )
    tree = _read_tree(path)
    version = tree.pop("format_version", None)
    if version != RUN_FORMAT_VERSION:
        raise ConfigError(f"{path} has format version {version}; this Papilio reads {RUN_FORMAT_VERSION}")
    return tree


def _read_tree(path: str) -> dict[str, Any]:
    """Read a JSON file of a run; one that is damaged or unreadable would be so again."""
    try:
        tree = read_json(path)
    except StorageError as error:
        if error.is_passing:
            raise
        raise ConfigError(f"{error}; restore it, or choose another output.run_dir") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} is damaged: it holds no table of values; restore it, or choose another output.run_dir"
        )
    return tree


def data_identity(dataset: Dataset) -> dict[str, Any]:
    """Return what tells a data set from others: schema, rows, checksums of shards and vocabularies."""
    manifest = dataset.manifest
    return {
        "path": dataset.folder,
        "format_version": manifest.format_version,
        "transform_version": manifest.transform_version,
        "schema": manifest.data_schema.model_dump(mode="json"),
        "num_embeddings": dataset.num_embeddings,
        "split_rule": manifest.split_rule,
        "source": manifest.source,
        "splits": {
            name: {"num_rows": split.num_rows, "shards": {shard.file: shard.crc32 for shard in split.shards}}
            for name, split in manifest.splits.items()
        },
        "vocabularies": {name: stats.vocabulary_crc32 for name, stats in manifest.categorical_stats.items()},
    }


def _job_id() -> str | None:
    """Id that torchrun gives a job and all its restarts."""
    return os.environ.get("TORCHELASTIC_RUN_ID")
