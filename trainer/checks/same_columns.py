"""Whether a data set's ids mean the same rows as those that a model was trained on. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

from papilio.data_pipeline.dataset import Dataset
from papilio.trainer.config_file import ConfigError


def check_same_columns(dataset: Dataset, trained_on: Mapping[str, object], run_dir: str) -> None:
    """Check that ids mean the same rows as in training.

    Raises:
        ConfigError: the data set was made with other columns, transforms or vocabularies.
    """
    manifest = dataset.manifest
    found = {
        "transform_version": manifest.transform_version,
        "num_embeddings": dataset.num_embeddings,
        "schema": manifest.data_schema.model_dump(mode="json"),
        "vocabularies": {name: stats.vocabulary_crc32 for name, stats in manifest.categorical_stats.items()},
    }
    differing = [key for key, value in found.items() if trained_on.get(key) != value]
    if differing:
        raise ConfigError(
            f"data set {dataset.folder} differs from the one {run_dir} was trained on in: {', '.join(differing)}; its "
            "ids would look up wrong rows. Preprocess it together with the training data"
        )
