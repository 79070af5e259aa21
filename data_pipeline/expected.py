"""A data set that does not exist yet: what is expected of its columns, enough to plan for it and to build its model.

From a shape that `papilio generate` knows, or from a TOML file:

    num_dense = 13

    [[categorical]]
    name = "user_id"
    num_embeddings = 40_000_000
    ids_per_sample = 1.0          # the default
"""

from __future__ import annotations

import difflib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from papilio.data_pipeline.dataset import Dataset
from papilio.data_pipeline.generate.shapes import SHAPES
from papilio.data_pipeline.manifest import CategoricalStats, DatasetError, Manifest
from papilio.data_pipeline.schema import NUM_RESERVED_IDS, CategoricalColumn, DenseColumn, Schema
from papilio.data_pipeline.toml_model import TomlError, explain, read_toml
from papilio.data_pipeline.version import papilio_version


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Column(_Section):
    name: str
    num_embeddings: int = Field(gt=NUM_RESERVED_IDS, lt=2**31)
    ids_per_sample: float = Field(1.0, gt=0)


class _Expected(_Section):
    num_dense: int = Field(ge=1)
    categorical: tuple[_Column, ...] = Field(min_length=1)


def expected_dataset(shape: str) -> Dataset:
    """Return a data set without rows whose columns are as the shape says.

    Args:
        shape: name of a shape, or path of a TOML file of the form above.

    Raises:
        DatasetError: there is neither, or the file has a wrong key or value.
    """
    return _without_rows(shape, _expected_of(shape))


def _expected_of(shape: str) -> _Expected:
    if shape in SHAPES:
        found = SHAPES[shape]
        columns = tuple(
            _Column(name=f"C{i + 1}", num_embeddings=cardinality + NUM_RESERVED_IDS, ids_per_sample=ids)
            for i, (cardinality, ids) in enumerate(zip(found.cardinalities, found.pooling_factors, strict=True))
        )
        return _Expected(num_dense=found.num_dense, categorical=columns)
    if not Path(shape).is_file():
        nearest = difflib.get_close_matches(shape, list(SHAPES), n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise DatasetError(
            f"shape {shape}: no such shape or file; {hint}shapes: {', '.join(SHAPES)}, or a TOML file that lists "
            "columns (data_pipeline/expected.py shows one)"
        )
    try:
        tree = read_toml(shape)
    except TomlError as error:
        raise DatasetError(f"shape {shape} {error}") from None
    try:
        return _Expected.model_validate(tree)
    except ValidationError as error:
        raise DatasetError(f"shape {shape}: {explain(error, _Expected, tree)}") from None


def _without_rows(source: str, expected: _Expected) -> Dataset:
    schema = Schema(
        dense=tuple(DenseColumn(name=f"I{i + 1}") for i in range(expected.num_dense)),
        categorical=tuple(
            CategoricalColumn(
                name=column.name,
                multi_hot=column.ids_per_sample > 1,
                kind="integer",
                encoding="identity",
                num_buckets=column.num_embeddings - NUM_RESERVED_IDS,
            )
            for column in expected.categorical
        ),
    )
    stats = {
        column.name: CategoricalStats(
            num_embeddings=column.num_embeddings,
            cardinality=column.num_embeddings - NUM_RESERVED_IDS,
            missing_rate=0.0,
            unknown_rate=0.0,
            mean_ids_per_sample=column.ids_per_sample,
            skew=0.0,
        )
        for column in expected.categorical
    }
    manifest = Manifest(
        papilio_version=papilio_version(),
        data_schema=schema,
        split_rule="none: not made yet",
        splits={},
        dense_stats={},
        categorical_stats=stats,
        source={"expected": source},
    )
    return Dataset(f"(expected: {source})", manifest)
