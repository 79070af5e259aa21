"""Small data sets written through the contract of shards and manifest alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from papilio.data_pipeline.manifest import (
    MANIFEST_NAME,
    CategoricalStats,
    Manifest,
    SplitInfo,
    read_manifest,
    write_manifest,
)
from papilio.data_pipeline.schema import NUM_RESERVED_IDS, CategoricalColumn, DenseColumn, Schema
from papilio.data_pipeline.shards import Bags, Columns, write_shard

ROWS_PER_TABLE = {"a": 30, "b": 11, "m": 17}
NUM_DENSE = 3
SPLIT_ROWS = {"train": 403, "validation": 90, "test": 60}


def make_schema() -> Schema:
    """Three dense columns, two one-hot features and a multi-hot one (m)."""
    return Schema(
        dense=tuple(DenseColumn(name=f"x{i}", transform="identity") for i in range(NUM_DENSE)),
        categorical=tuple(
            CategoricalColumn(
                name=name,
                multi_hot=name == "m",
                kind="integer",
                encoding="identity",
                num_buckets=rows - NUM_RESERVED_IDS,
            )
            for name, rows in ROWS_PER_TABLE.items()
        ),
    )


def write_dataset(folder, *, seed=0, labels="learnable", dense_scale=1.0, split_rows=SPLIT_ROWS, longest_bag=3):
    """Write a data set whose label depends on x0 and a ("learnable"), or on nothing ("random"); returns its folder."""
    generator = np.random.default_rng(seed)
    schema = make_schema()
    splits = {}
    for name, num_rows in split_rows.items():
        shards, positives = [], 0
        for index, size in enumerate([num_rows // 3, num_rows - num_rows // 3]):
            columns = _make_columns(generator, size, labels, dense_scale, longest_bag)
            shards.append(write_shard(columns, schema, str(folder), f"{name}/{index}.arrow"))
            positives += int(columns.labels.sum())
        splits[name] = SplitInfo(num_rows=num_rows, num_positives=positives, shards=tuple(shards))
    stats = {
        name: CategoricalStats(
            num_embeddings=rows, cardinality=rows, missing_rate=0, unknown_rate=0, mean_ids_per_sample=1, skew=0
        )
        for name, rows in ROWS_PER_TABLE.items()
    }
    manifest = Manifest(
        papilio_version="test",
        data_schema=schema,
        split_rule="made for a test",
        splits=splits,
        dense_stats={},
        categorical_stats=stats,
        source={},
    )
    write_manifest(manifest, str(folder))
    return str(folder)


def edit_manifest(folder, old, new):
    """Replace text in a data set's manifest, as if it had been made so: with the checksum of what it holds then."""
    text = read_manifest(str(folder)).model_dump_json(indent=1)
    assert old in text
    Path(folder, MANIFEST_NAME).unlink()
    write_manifest(Manifest.model_validate_json(text.replace(old, new)), str(folder))


def _make_columns(
    generator: np.random.Generator, size: int, labels: str, dense_scale: float, longest_bag: int
) -> Columns:
    dense = generator.normal(size=(size, NUM_DENSE)).astype(np.float32) * np.float32(dense_scale)
    ids = {name: generator.integers(0, rows, size, dtype=np.int32) for name, rows in ROWS_PER_TABLE.items()}
    lengths = generator.integers(0, longest_bag + 1, size)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    bag_ids = generator.integers(0, ROWS_PER_TABLE["m"], offsets[-1], dtype=np.int32)
    logit = 1.5 * dense[:, 0] / dense_scale + np.where(ids["a"] % 2, 1.0, -1.0)
    probability = 1 / (1 + np.exp(-logit)) if labels == "learnable" else np.full(size, 0.5)
    clicks = (generator.random(size) < probability).astype(np.uint8)
    return Columns(clicks, dense, (Bags(ids["a"]), Bags(ids["b"]), Bags(bag_ids, offsets)))
