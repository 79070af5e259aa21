"""The data set and the recipe of `benchmarks.faults`: every sample carries its number, so that logs can name it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from papilio.data_pipeline.manifest import CategoricalStats, Manifest, SplitInfo, write_manifest
from papilio.data_pipeline.schema import NUM_RESERVED_IDS, CategoricalColumn, DenseColumn, Schema
from papilio.data_pipeline.shards import Bags, Columns, write_shard

NUM_DENSE = 3
MULTI_HOT = "c"
# A sample's number times this is its first dense value: exact in float32, and small enough to train on.
SAMPLE_SCALE = 1 / 4096


@dataclass(frozen=True)
class Size:
    """How much there is to train.

    Attributes:
        rows: of the tables.
        train_samples: so many that the last batch of an epoch has 3 samples, fewer than 4 ranks.
        every_steps: steps between saves.
        longest_wait_s: kills that are not aimed at saves come at most so long after a start.
    """

    rows: dict[str, int]
    train_samples: int
    batch_size: int
    epochs: int
    dim: int
    every_steps: int
    longest_wait_s: float = 4.0

    @property
    def num_steps(self) -> int:
        """Steps of a whole run."""
        return self.epochs * -(-self.train_samples // self.batch_size)


FULL = Size({"a": 150_000, "b": 90_000, MULTI_HOT: 40_000, "d": 50}, 2_003, 25, 4, 32, 7)
SHORT = Size({"a": 60_000, "b": 40_000, MULTI_HOT: 20_000, "d": 50}, 1_003, 25, 2, 16, 7, 2.0)
# Tables cut into columns cannot go to another number of ranks without another trajectory of row-wise Adagrad.
TYPES_OF_FIXED_RANKS = {"a": "row_wise", "b": "table_wise", MULTI_HOT: "column_wise", "d": "data_parallel"}
TYPES_OF_CHANGING_RANKS = {"a": "row_wise", "b": "table_wise", MULTI_HOT: "table_wise", "d": "data_parallel"}


def write_data(folder: str, size: Size) -> None:
    """Write the data set; the label depends on the second dense value and on feature a."""
    generator = np.random.default_rng(7)
    schema = Schema(
        dense=tuple(DenseColumn(name=f"x{i}", transform="identity") for i in range(NUM_DENSE)),
        categorical=tuple(
            CategoricalColumn(
                name=name,
                multi_hot=name == MULTI_HOT,
                kind="integer",
                encoding="identity",
                num_buckets=rows - NUM_RESERVED_IDS,
            )
            for name, rows in size.rows.items()
        ),
    )
    splits = {}
    for split, num_rows in {"train": size.train_samples, "validation": 300, "test": 200}.items():
        shards, positives, first = [], 0, 0
        for index, count in enumerate([num_rows // 3, num_rows - num_rows // 3]):
            columns = _make_columns(generator, first, count, size)
            shards.append(write_shard(columns, schema, folder, f"{split}/{index}.arrow"))
            positives += int(columns.labels.sum())
            first += count
        splits[split] = SplitInfo(num_rows=num_rows, num_positives=positives, shards=tuple(shards))
    stats = {
        name: CategoricalStats(
            num_embeddings=rows, cardinality=rows, missing_rate=0, unknown_rate=0, mean_ids_per_sample=1, skew=0
        )
        for name, rows in size.rows.items()
    }
    manifest = Manifest(
        papilio_version="benchmark",
        data_schema=schema,
        split_rule="made for a benchmark",
        splits=splits,
        dense_stats={},
        categorical_stats=stats,
        source={},
    )
    write_manifest(manifest, folder)


def _make_columns(generator: np.random.Generator, first: int, count: int, size: Size) -> Columns:
    dense = generator.normal(size=(count, NUM_DENSE)).astype(np.float32)
    dense[:, 0] = np.arange(first, first + count) * np.float32(SAMPLE_SCALE)
    # Half of the ids are among few rows, which many steps change.
    ids = {name: _ids(generator, count, rows) for name, rows in size.rows.items()}
    lengths = generator.integers(0, 6, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    bags = {name: Bags(values) for name, values in ids.items()}
    bags[MULTI_HOT] = Bags(_ids(generator, int(offsets[-1]), size.rows[MULTI_HOT]), offsets)
    logit = 1.5 * dense[:, 1] + np.where(ids["a"] % 2, 1.0, -1.0)
    clicks = (generator.random(count) < 1 / (1 + np.exp(-logit))).astype(np.uint8)
    return Columns(clicks, dense, tuple(bags.values()))


def _ids(generator: np.random.Generator, count: int, rows: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    limits = np.where(generator.random(count) < 0.5, min(rows, 100), rows)
    return (generator.random(count) * limits).astype(np.int32)


def write_recipe(path: str, data: str, size: Size, types: dict[str, str]) -> str:
    """Write the recipe of a run whose tables are sharded by `types`; returns its path."""
    constraints = "".join(
        f'\n[[sharding.constraints]]\ntables = ["t_{name}"]\ntypes = ["{kind}"]\nmin_partition = {size.dim // 2}\n'
        for name, kind in types.items()
    )
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"""name = "faults"
seed = 11

[data]
path = "{os.path.abspath(data)}"
shuffle_block_rows = 4

[model]
embedding_dim = {size.dim}
dense_arch_layer_sizes = [32]
over_arch_layer_sizes = [32]

[optimizer.sparse]
name = "rowwise_adagrad"
learning_rate = 0.05
[optimizer.dense]
name = "adagrad"
learning_rate = 0.02
[schedule]
warmup_steps = 20
decay_start_step = 100
decay_steps = 400

[train]
global_batch_size = {size.batch_size}
epochs = {size.epochs}
log_every_steps = 20
log_every_s = 1000.0
eval_batch_size = 128

[checkpoint]
every_steps = {size.every_steps}
keep_last = 2
asynchronous = true

[output]
tensorboard = false

[sharding]
types = ["table_wise", "row_wise", "column_wise", "data_parallel"]
kernels = ["fused", "dense"]
{constraints}""")
    return path
