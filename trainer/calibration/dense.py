"""Timings of the dense part and its optimizer alone, and the figures that follow."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from papilio.sharding.calibration.fit import fit_relative
from papilio.sharding.hardware import free_rates
from papilio.sharding.planner.cost import dense_optimizer_s, dense_s
from papilio.trainer.calibration.synthetic import Shape, build_dlrm
from papilio.trainer.process_group import Ranks

DENSE_TERMS = (
    "layer_s",
    "activation_bytes_per_s",
    "interaction_flops_per_s",
    "interaction_bytes_per_s",
)
MATMULS = {"fp32": "matmul_fp32_flops_per_s", "bf16": "matmul_bf16_flops_per_s"}
UNLIMITED = 1e15
STREAM_VALUES = 16 << 20


def dense_shapes(*, is_quick: bool) -> list[Shape]:
    """Return the shapes whose dense part is timed; the global batch size is a rank's here."""
    small = Shape((10,) * 8, (1,) * 8, dim=16, bottom=(64,), top=(64,), global_batch_size=256)
    if is_quick:
        return [
            small,
            replace(small, bottom=(256, 128), top=(256,)),
            replace(small, rows=(10,) * 26, pooling_factors=(1,) * 26, dim=32),
        ]
    return [
        Shape((10,) * num_tables, (1,) * num_tables, dim, bottom=bottom, top=top, global_batch_size=batch)
        for num_tables, dim, bottom, top in (
            (8, 16, (64,), (64,)),
            (26, 16, (512, 256, 64), (512, 256)),
            (26, 64, (128, 64), (128,)),
            (60, 32, (128,), (256, 128)),
            (12, 128, (512, 256), (1024, 512)),
            (8, 64, (1024, 1024), (1024, 1024, 512)),
        )
        for batch in (512, 2048)
    ]


def measure_dense(ranks: Ranks, *, is_quick: bool) -> dict[str, float]:
    """Time forward and backward passes of dense parts, and their optimizer; every rank does the same."""
    shapes = dense_shapes(is_quick=is_quick)
    num_repeats = 3 if is_quick else 7
    figures: dict[str, float] = {}
    for precision, matmul in MATMULS.items():
        of_precision = [replace(shape, precision=precision) for shape in shapes]
        timings = [_time_dense(shape, ranks, num_repeats) for shape in of_precision]
        names = (matmul, *DENSE_TERMS)
        fitted = _fit(names, of_precision, [seconds for seconds, _ in timings])
        # What is not the matrix products' is stated once, as it is in fp32.
        figures |= {name: fitted[name] for name in names if name not in figures}
        if precision == "fp32":
            jobs = [shape.job() for shape in of_precision]
            terms = [[dense_optimizer_s(job, free_rates(optimizer_bytes_per_s=1.0)), 1.0] for job in jobs]
            per_byte = fit_relative(np.array(terms), np.array([seconds for _, seconds in timings]))[0]
            figures["optimizer_bytes_per_s"] = 1 / per_byte if per_byte else UNLIMITED
    return figures


def measure_memory(device: torch.device, num_repeats: int) -> float:
    """Return bytes per second of y = x + y over arrays that fit no cache."""
    x, y = (torch.ones(STREAM_VALUES, device=device) for _ in range(2))
    seconds = _median(lambda: y.add_(x), device, num_repeats)
    return 3 * 4 * STREAM_VALUES / seconds


def _fit(names: Sequence[str], shapes: Sequence[Shape], seconds: Sequence[float]) -> dict[str, float]:
    # Rates with which this one figure is 1 and nothing else costs anything.
    alone = [free_rates(**{name: 1.0}) for name in names]
    terms = np.array([[dense_s(shape.job(), rates, shape.global_batch_size) for rates in alone] for shape in shapes])
    values = fit_relative(terms, np.array(seconds)).tolist()
    figures = {}
    for name, value in zip(names, values, strict=True):
        is_rate = name.endswith("_per_s")
        figures[name] = (1 / value if value else UNLIMITED) if is_rate else value
    return figures


class _Given(nn.Module):
    """Stands in for the tables: hands on the pooled embeddings that it is given."""

    def forward(self, pooled: KeyedTensor) -> KeyedTensor:
        return pooled


def _time_dense(shape: Shape, ranks: Ranks, num_repeats: int) -> tuple[float, float]:
    """Return the seconds of a forward and backward pass, and of the optimizer."""
    model = build_dlrm(shape, ranks.device, seed=0)
    model.embedding_bag_collection = _Given()
    size, device = shape.global_batch_size, ranks.device
    values = torch.rand(size, len(shape.rows) * shape.dim, device=device, requires_grad=True)
    pooled = KeyedTensor(shape.features, [shape.dim] * len(shape.rows), values)
    dense, labels = torch.rand(size, shape.num_dense, device=device), torch.ones(size, device=device)
    optimizer = torch.optim.Adagrad(model.parameters(), fused=device.type == "cpu")

    def work() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=shape.precision == "bf16"):
            logits = model(dense, pooled)
        nn.functional.binary_cross_entropy_with_logits(logits.float(), labels).backward()  # type: ignore[no-untyped-call]

    def update() -> None:
        optimizer.step()

    seconds = _median(work, device, num_repeats)
    return seconds, _median(update, device, num_repeats)


def _median(work: Callable[[], object], device: torch.device, num_repeats: int) -> float:
    times = []
    for _ in range(num_repeats + 2):
        begin_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin_s)
    return statistics.median(times[2:]) if times else math.nan
