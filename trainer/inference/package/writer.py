"""Writes the files of a package but for its reports and its manifest, which come last (exporting.py)."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata

from safetensors.numpy import save

from papilio.data_pipeline.dataset import Dataset
from papilio.data_pipeline.inner_path import link_problem
from papilio.data_pipeline.paths import join, path_manager
from papilio.data_pipeline.version import papilio_version
from papilio.trainer.inference.backends.flat_model import build_flat_model
from papilio.trainer.inference.export.trained_model import TrainedModel
from papilio.trainer.inference.package.format import (
    CONFIG,
    DENSE,
    SAMPLE,
    SCHEMA,
    TABLES,
    Package,
    PackageError,
    PackageManifest,
    Source,
    describe_files,
)
from papilio.trainer.inference.package.sample import make_sample
from papilio.trainer.inference.package.table_writer import TableChoice, write_tables
from papilio.trainer.storage.api import exists, file_size, write_file, write_json, write_text
from papilio.trainer.storage.local_files import make_local_folder

_COPY_BYTES = 4 << 20
_VERSIONED = ("torch", "fbgemm-gpu-cpu", "fbgemm-gpu", "numpy", "safetensors")
OnBytes = Callable[[int], None]


def write_model(
    model: TrainedModel,
    dataset: Dataset,
    choices: Mapping[str, TableChoice],
    folder: str,
    *,
    run: str,
    on_bytes: OnBytes,
) -> Package:
    """Write tables, dense part and config to a new folder: all that predictions from ids need.

    Args:
        model: the checkpoint.
        dataset: where its columns come from.
        choices: how each table is stored, by name.
        folder: is made.
        run: what the user calls the run.
        on_bytes: hears of each piece that was read, in bytes of fp32 values.

    Returns:
        The package without a manifest on disk, so that nobody else takes it for one.

    Raises:
        PackageError: values that a precision cannot hold, or that are not finite.
        DamagedError: a block of the checkpoint is missing or damaged.
    """
    make_local_folder(folder)
    tables, tables_file = write_tables(model, choices, join(folder, TABLES), on_bytes)
    dense = save(model.read_dense())
    write_file(join(folder, DENSE), lambda: [dense])
    write_json(join(folder, CONFIG), model.config.model_dump(mode="json"))
    manifest = PackageManifest(
        papilio_version=papilio_version(),
        transform_version=dataset.manifest.transform_version,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        name=model.config.name,
        architecture=model.config.model.architecture,
        dense_features=tuple(dataset.schema.dense_names),
        tables=tuple(tables),
        source=Source(run=run, checkpoint=model.name, step=model.marker.step, data=dataset.folder),
        versions=_versions(),
        files={TABLES: tables_file, **describe_files(folder, [DENSE, CONFIG])},
    )
    return Package(folder, manifest, set(manifest.files))


def add_encoding(package: Package, dataset: Dataset) -> Package:
    """Add what turns raw records into ids, and a sample request with its answer; return the package with these.

    Raises:
        PackageError: the data set has no rows, or a vocabulary was changed.
        DatasetError: a shard is missing or damaged.
    """
    write_text(package.path(SCHEMA), dataset.schema.model_dump_json(indent=1) + "\n")
    vocabularies = _copy_vocabularies(dataset, package.folder)
    package = with_files(package, [SCHEMA, *vocabularies])
    write_json(package.path(SAMPLE), make_sample(package, dataset, build_flat_model(package)))
    return with_files(package, [SAMPLE])


def with_files(package: Package, names: list[str]) -> Package:
    """Return the package with these files, which lie in its folder, in its manifest."""
    files = {**package.manifest.files, **describe_files(package.folder, names)}
    manifest = package.manifest.model_copy(update={"files": files})
    # Not read again: written a moment ago, by this process.
    return Package(package.folder, manifest, set(files))


def vocabulary_bytes(dataset: Dataset) -> int:
    """Return the size of a data set's vocabularies, all together.

    Raises:
        PackageError: one is missing.
    """
    paths = [join(dataset.folder, file) for file in _vocabulary_files(dataset)]
    missing = [path for path in paths if not exists(path)]
    if missing:
        raise PackageError(f"vocabulary {missing[0]} is missing; restore it or preprocess the data again")
    return sum(map(file_size, paths))


def _vocabulary_files(dataset: Dataset) -> dict[str, int]:
    """Return the checksums of a data set's vocabularies by their paths in it."""
    stats = dataset.manifest.categorical_stats.values()
    return {found.vocabulary_file: found.vocabulary_crc32 or 0 for found in stats if found.vocabulary_file is not None}


def _copy_vocabularies(dataset: Dataset, folder: str) -> list[str]:
    found = _vocabulary_files(dataset)
    for file, crc32 in found.items():
        make_local_folder(os.path.dirname(join(folder, file)))
        source, problem = join(dataset.folder, file), link_problem(dataset.folder, file)
        if problem is not None:
            raise PackageError(f"vocabulary {problem}")
        if _copy(source, join(folder, file)) != crc32:
            raise PackageError(
                f"vocabulary {source} was changed after it was written (checksum differs from the manifest's); restore "
                "it or preprocess the data again"
            )
    return list(found)


def _copy(source: str, target: str) -> int:
    """Copy a file piece by piece; return the CRC-32 of its bytes."""
    crc32 = 0
    with path_manager.open(source, "rb") as reader, open(target, "xb") as writer:
        while piece := reader.read(_COPY_BYTES):
            writer.write(piece)
            crc32 = zlib.crc32(piece, crc32)
    return crc32


def _versions() -> dict[str, str]:
    versions = {}
    for package in _VERSIONED:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
