"""Runs whose model is right: labels are drawn from its own probabilities, by the formulas and not by our code."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.manifest import SplitInfo, read_manifest, write_manifest
from papilio.data_pipeline.shards import Columns, write_shard
from tests.support.datasets import write_dataset
from tests.support.trained_runs import expected_probabilities, make_config, random_weights, write_run

SPLIT_ROWS = {"train": 9, "validation": 900, "test": 2_100}


def write_scored_run(folder, *, change=lambda tensors: None, split_rows=SPLIT_ROWS, seed=0, **model):
    """Write a data set and a run under `folder`.

    Args:
        folder: an empty one.
        change: gets the tensors before labels are drawn, to change them in place.
        split_rows: rows of each split, in two shards.
        seed: of data, weights and labels.
        model: settings of the model.

    Returns:
        The folders of data and run, and the tensors of the checkpoint.
    """
    data = write_dataset(Path(folder, "data"), seed=seed, split_rows=split_rows)
    dataset, config = open_dataset(data, verify_checksums=False), make_config(data, **model)
    tensors = random_weights(dataset, config, seed)
    change(tensors)
    generator = np.random.default_rng(seed)
    splits = {}
    for name, info in dataset.manifest.splits.items():
        shards, num_positives = [], 0
        for number, shard in enumerate(info.shards):
            columns = dataset.open_split(name).shard(number)
            drawn = generator.random(columns.num_rows) < probabilities_of(config, tensors, columns)
            labels = drawn.astype(np.uint8)
            copied = Columns(labels, columns.dense.copy(), columns.bags)
            shards.append(write_shard(copied, dataset.schema, data, shard.file.replace(name, f"{name}_labelled")))
            num_positives += int(labels.sum())
        splits[name] = SplitInfo(num_rows=info.num_rows, num_positives=num_positives, shards=tuple(shards))
    manifest = read_manifest(data).model_copy(update={"splits": splits})
    Path(data, "manifest.json").unlink()
    write_manifest(manifest, data)
    run, tensors = write_run(Path(folder, "run"), data, tensors, **model)
    return data, run, tensors


def probabilities_of(config, tensors, columns, tables=None):
    """Probabilities [rows] of a shard's samples, in float64, of `tables` by feature (those of the checkpoint)."""
    features = ("a", "b", "m")
    tables = tables or {name: tensors[f"tables.t_{name}.weight"] for name in features}
    ids = np.concatenate([bags.ids for bags in columns.bags])
    lengths = [
        np.ones(columns.num_rows, int) if bags.offsets is None else np.diff(bags.offsets) for bags in columns.bags
    ]
    return expected_probabilities(config, tables, tensors, columns.dense, ids, np.concatenate(lengths))


def read_split(data, split):
    """All samples of a split as one shard's columns."""
    dataset = open_dataset(data)
    rows = dataset.open_split(split)
    shards = [rows.shard(number) for number in range(len(dataset.manifest.splits[split].shards))]
    return [(shard.labels, shard) for shard in shards]
