"""The planted teacher: the click probability of every generated sample, so that the best reachable AUC is known.

    logit = bias + functions of a few dense inputs + effects of single ids + products between pairs of features

The products are dot products of low-dimensional id vectors, which is what DLRM's interaction computes. Effects and
vectors are hashes of (feature, id), not of the seed: all data sets of a shape are labelled by the same teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from papilio.data_pipeline.generate.shapes import Shape
from papilio.data_pipeline.mixing import key_of, mix64
from papilio.data_pipeline.schema import NUM_RESERVED_IDS, UNKNOWN_ID
from papilio.data_pipeline.shards import Bags

LABEL_RATE = 0.25  # Criteo Kaggle: 0.256
# Variances of the logit's parts. Their sum decides the best AUC (about 0.80), their shares how much of it a model
# without interactions, or without ids, can reach. Chosen (2 CPU cores, November 2026) so that a DLRM comes within .004
# of the best test AUC (.813) in an epoch of 900k samples of criteo_small: batch 2048, Adagrad .03, 40 steps of warm-up.
DENSE_VARIANCE = 0.15
ID_VARIANCE = 0.1
PAIR_VARIANCE = 1.7

VECTOR_DIM = 2
VECTOR_MEAN = 0.5  # not 0: so each feature of a pair has an effect of its own too, which starts the learning
MAX_PAIRS = 2
NUM_DENSE_TERMS = 3
ID_FEATURE_STRIDE = 5  # every fifth feature has id effects
# The effects of the id of frequency rank r shrink as 1 / sqrt(1 + r / this): what cannot be learned from the few
# samples of a rare id is not put there.
SHRINK_RANK = 3.0


@dataclass(frozen=True)
class Inputs:
    """What the teacher looks at: `dense` [B, I] after the transform, one `Bags` per categorical column."""

    dense: NDArray[np.float32]
    bags: tuple[Bags, ...]


class Teacher:
    """Gives click probabilities. The bias and the scales of the parts are set on a pilot sample."""

    def __init__(self, shape: Shape, pilot: Inputs) -> None:
        self._shape = shape
        self._effects = {
            f: _normals("effect", f, shape.cardinalities[f], 1)
            for f in range(0, len(shape.cardinalities), ID_FEATURE_STRIDE)
        }
        self._pairs = _pairs(shape)
        members = sorted({f for pair in self._pairs for f in pair})
        self._vectors = {f: _vectors(f, shape.cardinalities[f]) for f in members}
        self._centers = np.zeros(3)
        self._scales = np.ones(3)
        parts = self._parts(pilot)
        self._centers = np.array([part.mean() for part in parts])
        variances = (DENSE_VARIANCE, ID_VARIANCE, PAIR_VARIANCE)
        self._scales = np.array([np.sqrt(v) / (part.std() or 1) for v, part in zip(variances, parts, strict=True)])
        self._bias = _bias_for_rate(self._centered_logits(pilot), LABEL_RATE)

    def probabilities(self, inputs: Inputs) -> NDArray[np.float32]:
        """Return the click probability of each sample, [B]."""
        return (1 / (1 + np.exp(-self._bias - self._centered_logits(inputs)))).astype(np.float32)

    def _centered_logits(self, inputs: Inputs) -> NDArray[np.float64]:
        logits = np.zeros(len(inputs.dense))
        for part, center, scale in zip(self._parts(inputs), self._centers, self._scales, strict=True):
            logits += (part - center) * scale
        return logits

    def _parts(self, inputs: Inputs) -> tuple[NDArray[np.float64], ...]:
        num_rows = len(inputs.dense)
        effects = np.zeros(num_rows)
        for feature, table in self._effects.items():
            effects += _pooled(table, inputs.bags[feature])[:, 0]
        vectors = {f: _pooled(table, inputs.bags[f]) for f, table in self._vectors.items()}
        products = np.zeros(num_rows)
        for left, right in self._pairs:
            products += np.einsum("bd,bd->b", vectors[left], vectors[right])
        return _dense_part(inputs.dense), effects, products


def _dense_part(dense: NDArray[np.float32]) -> NDArray[np.float64]:
    """Sum kinked and saturating functions of the first dense inputs (log counts, which lie between 0 and about 10)."""
    total = np.zeros(len(dense))
    for i in range(min(NUM_DENSE_TERMS, dense.shape[1])):
        x = dense[:, i].astype(np.float64)
        total += np.tanh(x - 1.5) if i % 2 == 0 else -np.abs(x - 2.5)
    return total


def _pairs(shape: Shape) -> list[tuple[int, int]]:
    """Choose the features that interact: the middling ones, neighbours in the order of their sizes."""
    by_size = sorted(range(len(shape.cardinalities)), key=lambda f: (shape.cardinalities[f], f))
    middle = by_size[len(by_size) // 4 :] if len(by_size) > 2 * MAX_PAIRS else by_size
    num_pairs = min(MAX_PAIRS, len(middle) // 2)
    return [(middle[2 * i], middle[2 * i + 1]) for i in range(num_pairs)]


def _vectors(feature: int, cardinality: int) -> NDArray[np.float32]:
    table = _normals("vector", feature, cardinality, VECTOR_DIM) + np.float32(VECTOR_MEAN)
    table[UNKNOWN_ID] = 0
    return table


def _normals(purpose: str, feature: int, cardinality: int, dim: int) -> NDArray[np.float32]:
    """Return the normal numbers of each id of a feature, [num_embeddings, dim], smaller for rarer ids."""
    ranks = np.arange(cardinality, dtype=np.uint64)
    table = np.zeros((cardinality + NUM_RESERVED_IDS, dim), np.float32)
    for d in range(dim):
        table[:, d] = _normal(np.arange(len(table), dtype=np.uint64), key_of("teacher", purpose, feature, d))
    table[NUM_RESERVED_IDS:] /= np.sqrt(1 + ranks / SHRINK_RANK).astype(np.float32)[:, None]
    table[UNKNOWN_ID] = 0
    return table


def _normal(numbers: NDArray[np.uint64], key: int) -> NDArray[np.float32]:
    # Box-Muller on the two halves of a hash.
    bits = mix64(mix64(numbers) ^ np.uint64(key))
    radius = ((bits >> np.uint64(32)).astype(np.float64) + 1) / 2.0**32
    angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2.0**32
    normals: NDArray[np.float32] = (np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)).astype(np.float32)
    return normals


def _pooled(table: NDArray[np.float32], bags: Bags) -> NDArray[np.float32]:
    """Sum each sample's rows of `table`, [B, D]."""
    rows = table[bags.ids]
    if bags.offsets is None:
        return rows
    sums = np.zeros((len(rows) + 1, rows.shape[1]))
    np.cumsum(rows, axis=0, dtype=np.float64, out=sums[1:])
    return (sums[bags.offsets[1:]] - sums[bags.offsets[:-1]]).astype(np.float32)


def _bias_for_rate(logits: NDArray[np.float64], rate: float) -> float:
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 / (1 + np.exp(-middle - logits))).mean() < rate else (low, middle)
    return low
