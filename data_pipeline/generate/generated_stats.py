"""What the manifest says of generated data, summed up row block by row block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from papilio.data_pipeline.generate.shapes import Shape
from papilio.data_pipeline.generate.synthetic import Chunk
from papilio.data_pipeline.manifest import CategoricalStats, DenseStats, ShardInfo, SplitInfo
from papilio.data_pipeline.schema import NUM_RESERVED_IDS

# Samples whose probabilities share a bin count as ties: the AUC is off by at most half the share of such pairs, which
# is about 1e-6 at this number.
NUM_AUC_BINS = 1 << 20


class SplitTruth:
    """How well the teacher's own probabilities do on a split: the best that any model can."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._log_likelihood = 0.0
        self._counts = np.zeros((2, NUM_AUC_BINS), np.int64)

    def add(self, labels: NDArray[np.uint8], probabilities: NDArray[np.float32]) -> None:
        """Count rows in."""
        self.num_rows += len(labels)
        of_label = np.where(labels == 1, probabilities, 1 - probabilities).astype(np.float64)
        self._log_likelihood += float(np.log(of_label).sum())
        bins = np.minimum(probabilities * np.float32(NUM_AUC_BINS), NUM_AUC_BINS - 1).astype(np.int64)
        for label in (0, 1):
            self._counts[label] += np.bincount(bins[labels == label], minlength=NUM_AUC_BINS)

    def split_info(self, shards: tuple[ShardInfo, ...]) -> SplitInfo:
        """Return the split's entry for the manifest; no best AUC when it holds one label only."""
        negatives, positives = self._counts
        num_pairs = int(negatives.sum()) * int(positives.sum())
        below = np.cumsum(negatives) - negatives
        num_ordered = float((positives * (below + negatives / 2)).sum())
        return SplitInfo(
            num_rows=self.num_rows,
            num_positives=int(positives.sum()),
            shards=shards,
            best_auc=num_ordered / num_pairs if num_pairs else None,
            best_logloss=-self._log_likelihood / self.num_rows if self.num_rows else None,
        )


class ColumnSums:
    """Statistics of the columns, over all splits."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._num_rows = 0
        self._num_missing_dense = np.zeros(shape.num_dense, np.int64)
        self._sums = np.zeros((2, shape.num_dense))
        self._extremes = np.array([[np.inf], [-np.inf]]) * np.ones(shape.num_dense)
        self._id_counts = [np.zeros(n + NUM_RESERVED_IDS, np.int64) for n in shape.cardinalities]
        self._num_missing = np.zeros(len(shape.cardinalities), np.int64)

    def add(self, chunk: Chunk) -> None:
        """Count rows in."""
        self._num_rows += len(chunk.labels)
        self._num_missing_dense += chunk.raw.is_missing.sum(1)
        for i in range(self._shape.num_dense):
            values = chunk.dense[:, i].astype(np.float64)
            self._sums[:, i] += values.sum(), values @ values
            self._extremes[0, i] = min(self._extremes[0, i], values.min())
            self._extremes[1, i] = max(self._extremes[1, i], values.max())
        for feature, bags in enumerate(chunk.raw.bags):
            counts = np.bincount(bags.ids, minlength=len(self._id_counts[feature]))
            self._num_missing[feature] += (
                counts[:NUM_RESERVED_IDS].sum()
                if bags.offsets is None
                else np.count_nonzero(np.diff(bags.offsets) == 0)
            )
            self._id_counts[feature] += counts

    def dense_stats(self) -> dict[str, DenseStats]:
        """Return the statistics of each dense column."""
        means = self._sums[0] / self._num_rows
        variances = np.maximum(self._sums[1] / self._num_rows - means**2, 0)
        return {
            name: DenseStats(
                missing_rate=int(self._num_missing_dense[i]) / self._num_rows,
                mean=float(means[i]),
                standard_deviation=float(np.sqrt(variances[i])),
                minimum=float(self._extremes[0, i]),
                maximum=float(self._extremes[1, i]),
            )
            for i, name in enumerate(self._shape.schema.dense_names)
        }

    def categorical_stats(self) -> dict[str, CategoricalStats]:
        """Return the statistics of each categorical column; missing values are no ids."""
        stats = {}
        for feature, name in enumerate(self._shape.schema.categorical_names):
            seen = self._id_counts[feature][NUM_RESERVED_IDS:]
            seen = -np.sort(-seen[seen > 0])
            num_ids = int(seen.sum())
            stats[name] = CategoricalStats(
                num_embeddings=self._shape.cardinalities[feature] + NUM_RESERVED_IDS,
                cardinality=len(seen),
                missing_rate=int(self._num_missing[feature]) / self._num_rows,
                unknown_rate=0.0,
                mean_ids_per_sample=num_ids / self._num_rows,
                skew=int(seen[: -(-len(seen) // 100)].sum()) / num_ids if num_ids else 0.0,
            )
        return stats
