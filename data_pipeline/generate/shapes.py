"""The shapes of data that `papilio generate` can make."""

from __future__ import annotations

from dataclasses import dataclass

from papilio.data_pipeline.schema import CategoricalColumn, DenseColumn, Schema

# Distinct ids of the 26 columns of Criteo Kaggle's train.txt.
_KAGGLE_CARDINALITIES = (
    *(1_460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194),
    *(27, 14_992, 5_461_306, 10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
)
# MLPerf DLRM-DCNv2's bag sizes, the longest (100 and 27) cut to 20 to keep a sample small.
_MULTI_HOT_POOLING_FACTORS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 20, 20, 10, 3, 1, 1)
# Ids of the Criteo Terabyte logs, capped at 40M, as MLPerf's DLRM-DCNv2 has them.
_TERABYTE_CARDINALITIES = (
    *(40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10),
    *(2_209, 11_938, 155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36),
)
_TERABYTE_POOLING_FACTORS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
_CHUNK_VALUES = 1 << 24


@dataclass(frozen=True)
class Shape:
    """Columns and skew of generated data.

    Attributes:
        name: what `--shape` calls it.
        num_dense: dense columns.
        cardinalities: distinct ids of each categorical column.
        pooling_factors: mean ids per sample of each; a column is multi-hot where it is above 1.
        skew: exponent of the Zipf law of the ids.
    """

    name: str
    num_dense: int
    cardinalities: tuple[int, ...]
    pooling_factors: tuple[int, ...]
    skew: float = 1.6

    @property
    def chunk_rows(self) -> int:
        """Rows generated at once: fixed by the shape, since the random numbers are drawn chunk by chunk."""
        values_per_row = self.num_dense + sum(self.pooling_factors)
        return max(1 << 10, min(1 << 18, 1 << (_CHUNK_VALUES // values_per_row).bit_length() - 1))

    @property
    def schema(self) -> Schema:
        """The columns of this shape; ids are frequency ranks, and row numbers once the reserved rows are added."""
        return Schema(
            dense=tuple(DenseColumn(name=f"I{i + 1}") for i in range(self.num_dense)),
            categorical=tuple(
                CategoricalColumn(
                    name=f"C{i + 1}",
                    multi_hot=pooling_factor > 1,
                    kind="integer",
                    encoding="identity",
                    num_buckets=cardinality,
                )
                for i, (cardinality, pooling_factor) in enumerate(
                    zip(self.cardinalities, self.pooling_factors, strict=True)
                )
            ),
        )


def _capped(max_ids: int) -> tuple[int, ...]:
    return tuple(min(cardinality, max_ids) for cardinality in _KAGGLE_CARDINALITIES)


_ONE_HOT = (1,) * len(_KAGGLE_CARDINALITIES)

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("criteo", 13, _capped(1_000_000), _ONE_HOT),
        Shape("criteo_small", 13, _capped(100_000), _ONE_HOT),
        Shape("criteo_multi_hot", 13, _capped(1_000_000), _MULTI_HOT_POOLING_FACTORS),
        Shape("criteo_terabyte", 13, _TERABYTE_CARDINALITIES, _ONE_HOT),
        Shape("criteo_terabyte_multi_hot", 13, _TERABYTE_CARDINALITIES, _TERABYTE_POOLING_FACTORS),
        # Naumov et al., Deep Learning Recommendation Model (2019), section 5.2.
        Shape("big_basin", 512, (1_000_000,) * 8, (1,) * 8),
        Shape("big_basin_pooling_10", 512, (1_000_000,) * 8, (10,) * 8),
    )
}
