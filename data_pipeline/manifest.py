"""The manifest: everything a reader needs to know of a data set, written last, so its presence means "complete"."""

from __future__ import annotations

import json
import zlib
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from papilio.data_pipeline.inner_path import InnerPath
from papilio.data_pipeline.paths import join, path_manager, replace
from papilio.data_pipeline.schema import TRANSFORM_VERSION, Schema

FORMAT_VERSION = 2  # 1 had no checksum and no warnings, and is still read
_READ_VERSIONS = (1, FORMAT_VERSION)
_CHECKSUM = "crc32"
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "validation", "test")


class DatasetError(ValueError):
    """A data set that cannot be read as it is; the message names the file and the fix."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardInfo(_Section):
    """One Arrow file of a split. `file` is relative to the data set's folder; `crc32` is of the whole file."""

    file: InnerPath
    num_rows: int = Field(ge=0)
    num_bytes: int = Field(ge=0)
    crc32: int = Field(ge=0)


class SplitInfo(_Section):
    """One split. `best_auc` and `best_logloss` are those of the generator's own probabilities: no model does better."""

    num_rows: int = Field(ge=0)
    num_positives: int = Field(ge=0)
    shards: tuple[ShardInfo, ...]
    best_auc: float | None = None
    best_logloss: float | None = None

    @property
    def label_rate(self) -> float:
        """Share of positive labels."""
        return self.num_positives / self.num_rows if self.num_rows else float("nan")


class DenseStats(_Section):
    """Of one dense column, over all splits, after the transform; the missing rate is a share of samples."""

    missing_rate: float
    mean: float
    standard_deviation: float
    minimum: float
    maximum: float


class CategoricalStats(_Section):
    """Of one categorical column, over all splits.

    `num_embeddings` rows hold every id (reserved ones included). `cardinality` counts distinct raw ids, or distinct
    rows for hashed columns. `skew` is the share of all ids that falls on the most frequent 1 % of the distinct ones.
    """

    num_embeddings: int = Field(ge=1)
    cardinality: int = Field(ge=0)
    missing_rate: float
    unknown_rate: float
    mean_ids_per_sample: float
    skew: float
    vocabulary_file: InnerPath | None = None
    vocabulary_crc32: int | None = None


class Manifest(_Section):
    """Contents of `manifest.json`. `source` says, in words and figures, where the rows came from.

    `warnings` are whole sentences: what in this data set most likely keeps a model from learning.
    """

    format_version: int = FORMAT_VERSION
    transform_version: int = TRANSFORM_VERSION
    papilio_version: str
    data_schema: Schema
    split_rule: str
    splits: dict[str, SplitInfo]
    dense_stats: dict[str, DenseStats]
    categorical_stats: dict[str, CategoricalStats]
    source: dict[str, str | int | float]
    num_bad_rows: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows over all splits."""
        return sum(split.num_rows for split in self.splits.values())


def write_manifest(manifest: Manifest, folder: str) -> None:
    """Write the manifest as the last file of a data set: through a temporary name, so that it is never half there."""
    path = join(folder, MANIFEST_NAME)
    content = manifest.model_dump(mode="json") | {"format_version": FORMAT_VERSION}
    with path_manager.open(path + ".tmp", "w") as file:
        file.write(json.dumps({_CHECKSUM: _checksum(content), **content}, indent=1) + "\n")
    replace(path + ".tmp", path)


def _checksum(content: dict[str, Any]) -> int:
    """CRC-32 of the values, not of the text: a manifest may be reformatted, but not changed."""
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(folder: str) -> Manifest:
    """Read and check the manifest of a data set.

    Raises:
        DatasetError: there is none, it is damaged, or it was written by another format or transform version.
    """
    path = join(folder, MANIFEST_NAME)
    try:
        if not path_manager.exists(path):
            raise DatasetError(
                f"{folder} is not a complete data set: it has no {MANIFEST_NAME}. Make one with `papilio preprocess` "
                "or `papilio generate`; a run that was cut off continues when given the same command again"
            )
        with path_manager.open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror or error}); give the right to read it") from None
    try:
        content = json.loads(data.decode("utf-8"))
        _check_versions(content, path)
        _check_checksum(content, path)
        return Manifest.model_validate(content)
    except DatasetError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except RecursionError:
        raise _damaged(path, "lists or objects nested far too deep") from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise _damaged(path, str(error)) from None


def _check_versions(content: Any, path: str) -> None:
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds a JSON {type(content).__name__}, must be an object")
    versions = (content.get("format_version"), content.get("transform_version"))
    if versions[0] not in _READ_VERSIONS or versions[1] != TRANSFORM_VERSION:
        raise DatasetError(
            f"{path} has format version {versions[0]!r:.40} and transform version {versions[1]!r:.40}; this Papilio "
            f"reads {' or '.join(map(str, _READ_VERSIONS))} and {TRANSFORM_VERSION}: preprocess the data again, or use "
            f"the Papilio that wrote it ({content.get('papilio_version', 'unknown version')!s:.40})"
        )


def _check_checksum(content: dict[str, Any], path: str) -> None:
    """Take the checksum out of `content` and compare it."""
    written = content.pop(_CHECKSUM, None)
    if content["format_version"] == 1 and written is None:
        return
    if written != _checksum(content):
        raise _damaged(
            path,
            "its checksum differs: a value was changed after it was written; restore it from a copy if there is one",
        )


def _damaged(path: str, what: str) -> DatasetError:
    return DatasetError(f"{path} is damaged ({what}); preprocess the data again")
