"""The models whose whole steps `papilio calibrate` measures: few, small, and far apart from each other."""

from __future__ import annotations

from dataclasses import dataclass, replace

from papilio.sharding.config import ShardingConfig
from papilio.trainer.calibration.synthetic import Shape


@dataclass(frozen=True)
class CalibrationStep:
    """A model and how it is sharded."""

    shape: Shape
    sharding: ShardingConfig

    def describe(self) -> str:
        """Name it in a few words."""
        types = (*self.sharding.types, *(kind for found in self.sharding.constraints for kind in found.types or ()))
        return (
            f"{' and '.join(types)}: {len(self.shape.rows)} tables x {self.shape.dim}, "
            f"batch {self.shape.global_batch_size}"
        )


def calibration_steps(num_ranks: int, *, is_quick: bool) -> list[CalibrationStep]:
    """Return what is measured with so many ranks; one rank knows table_wise and data_parallel only."""
    steps = [CalibrationStep(shape, _of_types(*types)) for shape, types in _combinations(num_ranks)]
    if num_ranks > 1:
        steps += [CalibrationStep(_SHAPES[name], _mixed(**patterns)) for name, patterns in _MIXTURES.items()]
    return [_shrink(step) for step in steps[:3]] if is_quick else steps


_SHAPES = {
    "tiny": Shape((1000,) * 8, (1,) * 8, bottom=(32,), top=(32,), global_batch_size=256),
    "few": Shape((60_000,) * 8, (1,) * 8, dim=64, bottom=(512, 256), top=(512, 256)),
    "many": Shape((1000, 20_000, 100_000) * 20, (1,) * 60, dim=16, bottom=(64,), top=(128,)),
    "deep": Shape((50_000,) * 8, (2,) * 8, dim=32, bottom=(1024, 512), top=(1024, 1024), global_batch_size=1024),
    "pooled": Shape((2000, 20_000, 150_000) * 6, (4, 10, 20) * 6, dim=32, bottom=(128,), top=(128,)),
    "wide": Shape((1000, 10_000, 50_000) * 4, (3,) * 12, dim=128, bottom=(256,), top=(256,)),
    "small_batch": Shape((5000,) * 32, (2,) * 32, dim=32, bottom=(256, 64), top=(256,), global_batch_size=512),
    "large_batch": Shape(
        (20_000, 150_000) * 10, (1, 3) * 10, dim=32, bottom=(128,), top=(256,), global_batch_size=8192
    ),
    "shallow": Shape((10_000,) * 8, (3,) * 8, dim=64, bottom=(32,), top=(32,), global_batch_size=4096),
    "replicated": Shape((500, 3000) * 8, (2,) * 16, dim=16, bottom=(128,), top=(128,)),
    "replicated_wide": Shape((2000, 8000) * 6, (1, 5) * 6, dim=64, bottom=(128,), top=(128,)),
    "replicated_many": Shape((1000,) * 40, (1,) * 40, bottom=(32,), top=(32,), global_batch_size=512),
}
# Tables of these names are cut so; each type in use is a sharding group with kernels and collectives of its own.
_MIXTURES = {
    "many": {"row_wise": "t_c1*"},
    "tiny": {"row_wise": "t_c[0-2]", "column_wise": "t_c[3-5]"},
    "few": {"row_wise": "t_c[0-3]", "column_wise": "t_c[45]"},
    "small_batch": {"row_wise": "t_c1*", "column_wise": "t_c2*"},
    "wide": {"column_wise": "t_c[0-5]"},
}
_REPLICATED = tuple(name for name in _SHAPES if name.startswith("replicated"))
_TABLE_WISE = tuple(name for name in _SHAPES if name not in _REPLICATED)


def _combinations(num_ranks: int) -> list[tuple[Shape, tuple[str, ...]]]:
    chosen = [(name, "table_wise") for name in _TABLE_WISE] + [(name, "data_parallel") for name in _REPLICATED]
    if num_ranks == 1:
        chosen += [(name, "table_wise") for name in _REPLICATED]
    else:
        chosen += [(name, "row_wise") for name in ("tiny", "few", "pooled", "small_batch", "wide", "shallow")]
        chosen += [(name, "column_wise") for name in ("few", "pooled", "small_batch")]
        chosen += [(name, "table_row_wise") for name in ("small_batch", "wide", "shallow")]
    return [(_SHAPES[name], (sharding_type,)) for name, sharding_type in chosen]


def _of_types(*types: str) -> ShardingConfig:
    kernels = ("dense",) if types == ("data_parallel",) else ("fused",)
    return ShardingConfig.model_validate({"types": types, "kernels": kernels, "memory_per_rank_gib": 64})


def _mixed(**patterns: str) -> ShardingConfig:
    """Whole tables, but those of a pattern in its type."""
    constraints = [{"tables": (pattern,), "types": (kind,), "min_partition": 4} for kind, pattern in patterns.items()]
    return ShardingConfig.model_validate({"types": ("table_wise",), "constraints": constraints})


def _shrink(step: CalibrationStep) -> CalibrationStep:
    """Make a step quick to build and to run."""
    shape = step.shape
    rows = tuple(min(rows, 2000) for rows in shape.rows)
    return replace(step, shape=replace(shape, rows=rows, bottom=(32,), top=(32,), global_batch_size=256))
