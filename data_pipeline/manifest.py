"""The manifest: everything a reader needs to know of a data set, written last, so its presence means "complete"."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipeline.inner_path import InnerPath
from data_pipeline.paths import join, path_manager, replace
from data_pipeline.schema import TRANSFORM_VERSION, Schema

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "validation", "test")


class DatasetError(ValueError):
    """A data set that cannot be read as it is; the message names the file and the mend."""


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
    """Contents of `manifest.json`. `source` says, in words and figures, where the rows came from."""

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

    @property
    def num_rows(self) -> int:
        """Rows over all splits."""
        return sum(split.num_rows for split in self.splits.values())


def write_manifest(manifest: Manifest, folder: str) -> None:
    """Write the manifest as the last file of a data set: through a temporary name, so that it is never half there."""
    path = join(folder, MANIFEST_NAME)
    with path_manager.open(path + ".tmp", "w") as file:
        file.write(manifest.model_dump_json(indent=1) + "\n")
    replace(path + ".tmp", path)


def read_manifest(folder: str) -> Manifest:
    """Read and check the manifest of a data set.

    Raises:
        DatasetError: there is none, it is damaged, or it was written by another format or transform version.
    """
    path = join(folder, MANIFEST_NAME)
    if not path_manager.exists(path):
        raise DatasetError(
            f"{folder} is not a complete data set: it has no {MANIFEST_NAME}. Make one with `papilio preprocess` or "
            "`papilio generate`; a run that was cut off continues when given the same command again"
        )
    with path_manager.open(path, "r") as file:
        text = file.read()
    try:
        found = json.loads(text)
        versions = (found.get("format_version"), found.get("transform_version"))
        if versions != (FORMAT_VERSION, TRANSFORM_VERSION):
            raise DatasetError(
                f"{path} has format version {versions[0]} and transform version {versions[1]}; this Papilio reads "
                f"{FORMAT_VERSION} and {TRANSFORM_VERSION}: preprocess the data again, or use the Papilio that wrote "
                f"it ({found.get('papilio_version', 'unknown version')})"
            )
        return Manifest.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DatasetError(f"{path} is damaged ({key}: {first['msg']}); preprocess the data again") from None
    except (json.JSONDecodeError, AttributeError) as error:
        raise DatasetError(f"{path} is damaged ({error}); preprocess the data again") from None
