"""Drawing rows of generated data: a pure function of (shape, seed, chunk)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from papilio.data_pipeline.generate.shapes import Shape
from papilio.data_pipeline.generate.teacher import Inputs, Teacher
from papilio.data_pipeline.mixing import key_of
from papilio.data_pipeline.schema import MISSING_ID, NUM_RESERVED_IDS, Schema
from papilio.data_pipeline.shards import Bags
from papilio.data_pipeline.transforms import transform_dense

PILOT_ROWS = 1 << 16

# Missing rates, medians (log) and spreads of the dense columns, repeated where there are more than 13 of them; about
# those of Criteo Kaggle.
_DENSE_MISSING_RATES = (0.45, 0.0, 0.21, 0.22, 0.03, 0.22, 0.04, 0.0, 0.04, 0.45, 0.04, 0.77, 0.22)
_DENSE_LOG_MEDIANS = (1.0, 1.8, 2.2, 1.7, 5.0, 3.2, 1.8, 2.0, 3.6, 0.6, 1.2, 0.6, 1.8)
_DENSE_SPREADS = (0.9, 1.3, 1.2, 0.9, 1.6, 1.4, 1.2, 0.9, 1.3, 0.4, 0.8, 0.6, 1.0)
_MAX_LOG_COUNT = 15.0
_ID_MISSING_RATES = (
    *(0.0, 0.0, 0.03, 0.03, 0.0, 0.12, 0.0, 0.0, 0.0, 0.0, 0.0, 0.03, 0.0),
    *(0.0, 0.0, 0.03, 0.0, 0.0, 0.44, 0.44, 0.03, 0.76, 0.0, 0.03, 0.44, 0.44),
)


@dataclass(frozen=True)
class RawRows:
    """Rows before preprocessing.

    `counts` [I, B] are the raw dense values (-1 and up), void where `is_missing` [I, B]; `bags` hold ids as the
    shards do: frequency rank + NUM_RESERVED_IDS, MISSING_ID for an empty one-hot field.
    """

    counts: NDArray[np.int32]
    is_missing: NDArray[np.bool_]
    bags: tuple[Bags, ...]

    def dense(self, schema: Schema) -> NDArray[np.float32]:
        """Return the dense inputs after the schema's transform, [B, I]."""
        dense = np.empty(self.counts.shape[::-1], np.float32)
        for i, column in enumerate(schema.dense):
            dense[:, i] = transform_dense(self.counts[i].astype(np.float64), self.is_missing[i], column)
        return dense


@dataclass(frozen=True)
class Chunk:
    """Generated rows: raw, as the model sees them, and the truth about them."""

    raw: RawRows
    dense: NDArray[np.float32]
    labels: NDArray[np.uint8]
    probabilities: NDArray[np.float32]


def make_teacher(shape: Shape) -> Teacher:
    """Make the shape's teacher; it does not depend on the seed of the data."""
    raw = _draw_rows(shape, 0, "pilot", 0, min(PILOT_ROWS, shape.chunk_rows))
    return Teacher(shape, Inputs(raw.dense(shape.schema), raw.bags))


def draw_chunk(shape: Shape, teacher: Teacher, seed: int, chunk: int) -> Chunk:
    """Draw the `shape.chunk_rows` rows of chunk number `chunk`."""
    raw = _draw_rows(shape, seed, "rows", chunk, shape.chunk_rows)
    dense = raw.dense(shape.schema)
    probabilities = teacher.probabilities(Inputs(dense, raw.bags))
    draws = _generator(seed, "labels", chunk, 0).random(len(dense), np.float32)
    return Chunk(raw, dense, (draws < probabilities).astype(np.uint8), probabilities)


def _draw_rows(shape: Shape, seed: int, purpose: str, chunk: int, num_rows: int) -> RawRows:
    counts = np.empty((shape.num_dense, num_rows), np.int32)
    is_missing = np.zeros((shape.num_dense, num_rows), bool)
    for i in range(shape.num_dense):
        generator = _generator(seed, purpose + " dense", chunk, i)
        logs = generator.standard_normal(num_rows, np.float32)
        logs *= np.float32(_cycle(_DENSE_SPREADS, i))
        logs += np.float32(_cycle(_DENSE_LOG_MEDIANS, i))
        counts[i] = np.exp(np.minimum(logs, np.float32(_MAX_LOG_COUNT))).astype(np.int32) - 1
        if rate := _cycle(_DENSE_MISSING_RATES, i):
            is_missing[i] = generator.random(num_rows, np.float32) < rate
    bags = tuple(
        _draw_bags(shape, _generator(seed, purpose + " ids", chunk, f), f, num_rows)
        for f in range(len(shape.cardinalities))
    )
    return RawRows(counts, is_missing, bags)


def _draw_bags(shape: Shape, generator: np.random.Generator, feature: int, num_rows: int) -> Bags:
    cardinality, pooling_factor = shape.cardinalities[feature], shape.pooling_factors[feature]
    if pooling_factor > 1:
        # Uniform bag sizes around the mean; an empty bag is a missing value.
        sizes = generator.integers(0, 2 * pooling_factor + 1, num_rows, np.int32)
        offsets = np.zeros(num_rows + 1, np.int32)
        np.cumsum(sizes, out=offsets[1:])
        return Bags(_draw_ids(generator, cardinality, shape.skew, int(offsets[-1])), offsets)
    ids = _draw_ids(generator, cardinality, shape.skew, num_rows)
    if rate := _cycle(_ID_MISSING_RATES, feature):
        ids[generator.random(num_rows, np.float32) < rate] = MISSING_ID
    return Bags(ids)


def _draw_ids(generator: np.random.Generator, cardinality: int, skew: float, size: int) -> NDArray[np.int32]:
    # Inverse of the distribution function of the continuous power law on [1, cardinality + 1), rounded down.
    exponent = np.float32(1 - skew)
    values = generator.random(size, np.float32)
    values *= np.float32((cardinality + 1.0) ** (1 - skew) - 1)
    values += np.float32(1)
    np.log(values, out=values)
    values /= exponent
    np.exp(values, out=values)
    ranks = values.astype(np.int32) - 1
    return np.clip(ranks, 0, cardinality - 1) + np.int32(NUM_RESERVED_IDS)


def _generator(seed: int, purpose: str, chunk: int, column: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key_of(seed, purpose, chunk, column)))


def _cycle(values: tuple[float, ...], index: int) -> float:
    return values[index % len(values)]
