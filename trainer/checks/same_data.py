"""Whether a data set's ids look up the rows that they did in training, of a run or of a package. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

from papilio.data_pipeline.dataset import Dataset
from papilio.trainer.config_file import ConfigError
from papilio.trainer.inference.package.format import SCHEMA, VOCABULARIES, Package, PackageError


def check_data_of_run(dataset: Dataset, trained_on: Mapping[str, object], run_dir: str) -> None:
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


def check_data_of_package(package: Package, dataset: Dataset) -> None:
    """Check that a data set was made with the package's columns, transforms and vocabularies.

    Raises:
        PackageError: it was not; names what differs.
    """
    manifest = dataset.manifest
    vocabularies = {
        stats.vocabulary_file: stats.vocabulary_crc32
        for stats in manifest.categorical_stats.values()
        if stats.vocabulary_file is not None
    }
    packaged = {name: file.crc32 for name, file in package.manifest.files.items() if name.startswith(VOCABULARIES)}
    same = {
        "the version of the transforms": manifest.transform_version == package.manifest.transform_version,
        "columns": dataset.schema.model_dump(mode="json") == package.read_json(SCHEMA),
        "vocabularies": vocabularies == packaged,
    }
    differing = [name for name, is_same in same.items() if not is_same]
    if differing:
        raise PackageError(
            f"data set {dataset.folder} differs from that of {package.folder} in: {', '.join(differing)}; its ids "
            "would look up wrong rows. Preprocess it together with the training data"
        )
