"""The run folder: everything that says what a run was, and what came of it."""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import metadata
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from data_pipeline.dataset import Dataset
from trainer.checkpoint.config import CheckpointConfig
from trainer.config import Config, OutputConfig
from trainer.config_file import ConfigError, build_config
from trainer.storage import exists, list_folder, make_folder, read_json, write_json, write_text

RUN_FORMAT_VERSION = 1
JOB = "job.json"
VERSIONED_PACKAGES = (
    "papilio",
    "torch",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "torchrec",
    "torchx-nightly",
    "numpy",
    "pyarrow",
)


def choose_run_dir(config: OutputConfig, name: str) -> str:
    """Return the folder of this run: the one named in the config, that of the same elastic job, or a new one.

    torchrun starts the ranks of a job anew after a failure, with the job's id the same and the time another one.
    """
    if config.run_dir is not None:
        return config.run_dir
    job_id = _job_id()
    for folder in sorted(list_folder(config.runs_dir), reverse=True) if job_id else ():
        path = os.path.join(config.runs_dir, folder, JOB)
        if folder.startswith(f"{name}-") and exists(path) and read_json(path)["id"] == job_id:
            return os.path.join(config.runs_dir, folder)
    path = os.path.join(config.runs_dir, f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}")
    # Two jobs may begin in the same second.
    return next(free for free in (path, *(f"{path}-{number}" for number in range(2, 1_000))) if not exists(free))


def checkpoints_dir(run_dir: str, config: CheckpointConfig) -> str:
    """Return where a run's checkpoints lie."""
    return config.folder or os.path.join(run_dir, "checkpoints")


class RunFolder:
    """Writes a run's folder; only rank 0 has one. Measurements are appended as they come."""

    def __init__(self, path: str, config: Config, dataset: Dataset, step: int = 0) -> None:
        """Begin a run, or go on with one that has done `step` steps: what was measured after them is dropped."""
        self.path = path
        make_folder(path)
        write_json(self.file("config.json"), {"format_version": RUN_FORMAT_VERSION, **config.model_dump(mode="json")})
        write_json(self.file("versions.json"), package_versions())
        write_json(self.file("data.json"), data_identity(dataset))
        write_json(self.file(JOB), {"id": _job_id()})
        _drop_after(self.file("metrics.jsonl"), step)
        self._metrics = open(self.file("metrics.jsonl"), "a", buffering=1, encoding="utf-8")  # noqa: SIM115  # open for the run
        self._events = None
        if config.output.tensorboard:
            self._events = SummaryWriter(self.file("tensorboard"), purge_step=step + 1 if step else None)

    def file(self, name: str) -> str:
        """Path of a file of the folder."""
        return os.path.join(self.path, name)

    def write_plan(self, plan_json: str) -> None:
        """Keep the plan."""
        write_text(self.file("plan.json"), plan_json)

    def append(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl and a point to each of TensorBoard's curves; `kind` names the split or phase."""
        self._metrics.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(f"{kind}/{name}", value, step)

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
    return _read_config(run_dir), read_json(os.path.join(run_dir, "data.json"))


def _read_config(run_dir: str) -> dict[str, Any]:
    path = os.path.join(run_dir, "config.json")
    if not exists(path):
        raise ConfigError(
            f"{run_dir} is not a run folder: it has no config.json; give the folder that training printed"
        )
    tree: dict[str, Any] = read_json(path)
    version = tree.pop("format_version", None)
    if version != RUN_FORMAT_VERSION:
        raise ConfigError(f"{path} has format version {version}; this Papilio reads {RUN_FORMAT_VERSION}")
    return tree


def package_versions() -> dict[str, str]:
    """Return the versions of what a run is made with."""
    versions = {"python": sys.version.split()[0]}
    for package in VERSIONED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


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


def _drop_after(path: str, step: int) -> None:
    """Drop what will be measured again, and a last line that is cut off.

    That is all of the steps after `step`, and a test split of this very step: it is measured after the checkpoint.
    """
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line) if line.endswith("\n") else None
            if entry and (entry["step"] < step or (entry["step"] == step and entry["kind"] != "test")):
                kept.append(line)
    write_text(path, "".join(kept))
