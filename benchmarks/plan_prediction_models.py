"""The models of benchmarks/plan_predictions.py; none of them is one of `papilio calibrate`."""

from __future__ import annotations

import random
from dataclasses import replace

from papilio.trainer.calibration.synthetic import Shape

SEED = 20261121
MAX_MODEL_BYTES = 1 << 30
MAX_REPLICATED_BYTES = 64 << 20


def study_shapes() -> list[Shape]:
    """Models of 8 to 100 tables: rows 1e3 to 2e6, dims 8 to 128, 1 to 20 ids a bag, all drawn with a fixed seed."""
    generator = random.Random(SEED)
    return [
        _draw(generator, num_tables=8, dim=64, bottom=(512, 256), top=(512, 256), batch=2048),
        _draw(generator, num_tables=12, dim=128, bottom=(256,), top=(1024, 512), batch=1024),
        _draw(generator, num_tables=16, dim=32, bottom=(512, 256, 64), top=(512, 256), batch=4096),
        _draw(generator, num_tables=26, dim=16, bottom=(512, 256, 64), top=(512, 256), batch=2048, most_ids=1),
        _draw(generator, num_tables=26, dim=48, bottom=(256, 128), top=(256,), batch=1024),
        _draw(generator, num_tables=40, dim=24, bottom=(128,), top=(512, 512, 256), batch=2048),
        _draw(generator, num_tables=64, dim=8, bottom=(64,), top=(256, 64), batch=2048),
        _draw(generator, num_tables=100, dim=16, bottom=(128, 64), top=(256,), batch=1024),
        # All small enough to be replicated.
        replace(
            _draw(generator, num_tables=20, dim=32, bottom=(256,), top=(256, 128), batch=2048),
            rows=tuple(round(10 ** generator.uniform(3, 4)) for _ in range(20)),
        ),
    ]


def brute_force_shapes() -> list[Shape]:
    """Models small enough that many plans of each can be measured."""
    generator = random.Random(SEED + 1)
    return [
        _draw(generator, num_tables=6, dim=64, bottom=(256,), top=(256,), batch=2048),
        _draw(generator, num_tables=10, dim=32, bottom=(512, 256), top=(256,), batch=4096),
        _draw(generator, num_tables=5, dim=128, bottom=(128,), top=(128,), batch=1024),
    ]


def can_replicate(shape: Shape) -> bool:
    """Whether data_parallel makes sense: its update passes over whole tables."""
    return 4 * shape.dim * sum(shape.rows) <= MAX_REPLICATED_BYTES


def _draw(
    generator: random.Random,
    *,
    num_tables: int,
    dim: int,
    bottom: tuple[int, ...],
    top: tuple[int, ...],
    batch: int,
    most_ids: int = 20,
) -> Shape:
    most_rows = min(2e6, 3 * MAX_MODEL_BYTES / (4 * dim * num_tables))
    rows = [round(1000 * (most_rows / 1000) ** generator.random()) for _ in range(num_tables)]
    # Few bags are long.
    ids = [max(1, round(most_ids ** (generator.random() ** 2))) for _ in range(num_tables)]
    return Shape(tuple(rows), tuple(ids), dim, bottom=bottom, top=top, global_batch_size=batch)
