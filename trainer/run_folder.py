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
from trainer.config import Config, OutputConfig
from trainer.config_file import ConfigError, build_config
from trainer.storage import make_folder, path_manager, read_json, write_json, write_text

RUN_FORMAT_VERSION = 1
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
    """Return the folder of a new run.

    Raises:
        ConfigError: the folder named in the config holds a run already.
    """
    if config.run_dir is None:
        return os.path.join(config.runs_dir, f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}")
    if path_manager.exists(os.path.join(config.run_dir, "config.json")):
        raise ConfigError(f"output.run_dir = {config.run_dir} holds a run already; choose another folder")
    return config.run_dir


class RunFolder:
    """Writes a run's folder; only rank 0 has one. Measurements are appended as they come."""

    def __init__(self, path: str, config: Config, dataset: Dataset) -> None:
        self.path = path
        make_folder(path)
        write_json(self.file("config.json"), {"format_version": RUN_FORMAT_VERSION, **config.model_dump(mode="json")})
        write_json(self.file("versions.json"), _versions())
        write_json(self.file("data.json"), _data_identity(dataset))
        self._metrics = open(self.file("metrics.jsonl"), "a", buffering=1, encoding="utf-8")  # noqa: SIM115  # open for the run
        self._events = SummaryWriter(self.file("tensorboard")) if config.output.tensorboard else None

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
    """Read the config of a finished run.

    Raises:
        ConfigError: the folder is not a run's, or another version of Papilio wrote it.
    """
    path = os.path.join(run_dir, "config.json")
    if not path_manager.exists(path):
        raise ConfigError(
            f"{run_dir} is not a run folder: it has no config.json; give the folder that training printed"
        )
    tree = read_json(path)
    version = tree.pop("format_version", None)
    if version != RUN_FORMAT_VERSION:
        raise ConfigError(f"{path} has format version {version}; this Papilio reads {RUN_FORMAT_VERSION}")
    return build_config(tree, source=path)


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in VERSIONED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def _data_identity(dataset: Dataset) -> dict[str, Any]:
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
