"""Timings of FBGEMM's lookup and of its update with each optimizer, and the figures that follow."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn

from papilio.sharding.calibration.fit import fit_relative
from papilio.sharding.hardware import KernelRates
from papilio.sharding.planner.cost import kernel_s, touched_row_bytes
from papilio.sharding.runtime.rowwise_adagrad import speed_up_rowwise_adagrad

OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
}
KERNEL_FIELDS = tuple(field.name for field in fields(KernelRates))
# Bytes passed over between two runs, as the dense part does between two lookups: nothing stays in the nearest cache.
FLUSHED_VALUES = 2 << 20
MAX_TABLE_VALUES = 1 << 27


@dataclass(frozen=True)
class Case:
    """Tables of one size, looked up together."""

    num_tables: int
    num_rows: int
    num_columns: int
    pooling_factor: int
    batch_size: int

    @property
    def num_bags(self) -> int:
        """Bags of all tables."""
        return self.num_tables * self.batch_size


@dataclass(frozen=True)
class KernelTiming:
    """Seconds of a case's lookup and update."""

    case: Case
    lookup_s: float
    update_s: float


def cases(optimizer: str, *, is_quick: bool) -> list[Case]:
    """Return what is timed: from tables that fit a core's cache to tables that fit none, one id a bag and ten.

    The optimizer that recipes have by default, row-wise Adagrad, is measured most densely.
    """
    if is_quick:
        return [Case(2, rows, dim, factor, 256) for rows in (1000, 100_000) for dim, factor in ((16, 1), (64, 8))]
    sizes = [(6, 1000), (6, 10_000), (3, 250_000), (1, 1_500_000)]
    dims: tuple[int, ...] = (32, 128)
    if optimizer == "rowwise_adagrad":
        sizes, dims = [*sizes, (6, 60_000)], (16, 64, 128)
    return [
        Case(num_tables, num_rows, dim, factor, 1024)
        for num_tables, num_rows in sizes
        for dim in dims
        for factor in (1, 10)
        if num_rows * dim <= MAX_TABLE_VALUES
    ]


def time_kernels(optimizer: str, case: Case, device: torch.device, num_repeats: int) -> KernelTiming:
    """Time a case, medians of so many repeats after one more."""
    tables = _make_tables(optimizer, case, device)
    generator = torch.Generator().manual_seed(0)
    num_ids = case.num_bags * case.pooling_factor
    offsets = torch.arange(0, num_ids + 1, case.pooling_factor, dtype=torch.int32).to(device)
    cold = torch.zeros(FLUSHED_VALUES, device=device)
    lookups, updates = [], []
    for _ in range(num_repeats + 1):
        ids = torch.randint(case.num_rows, (num_ids,), generator=generator, dtype=torch.int32).to(device)
        cold.add_(1)
        begin_s = _now(device)
        pooled = tables(ids, offsets)
        lookups.append(_now(device) - begin_s)
        gradient = torch.ones_like(pooled)
        cold.add_(1)
        begin_s = _now(device)
        pooled.backward(gradient)
        updates.append(_now(device) - begin_s)
    return KernelTiming(case, statistics.median(lookups[1:]), statistics.median(updates[1:]))


def fit_kernels(timings: Mapping[str, Iterable[KernelTiming]]) -> dict[str, float]:
    """Return the figures `lookup_...` and `update_<optimizer>_...` (and `update_...`, row-wise Adagrad's or SGD's)."""
    by_optimizer = {name: list(found) for name, found in timings.items()}
    everything = [timing for found in by_optimizer.values() for timing in found]
    figures = _fit("lookup", [(timing.case, timing.lookup_s) for timing in everything], "")
    for name, found in by_optimizer.items():
        figures |= _fit(f"update_{name}", [(timing.case, timing.update_s) for timing in found], name)
    usual = "rowwise_adagrad" if "rowwise_adagrad" in by_optimizer else next(iter(by_optimizer))
    return figures | {f"update_{name}": figures[f"update_{usual}_{name}"] for name in KERNEL_FIELDS}


def _fit(kernel: str, timed: list[tuple[Case, float]], optimizer: str) -> dict[str, float]:
    """Fit the terms of `kernel_s`, and a fixed time of each call, which belongs to the group's overhead instead."""
    terms = np.array([[*(_term(name, case, optimizer) for name in KERNEL_FIELDS), 1.0] for case, _ in timed])
    values = fit_relative(terms, np.array([seconds for _, seconds in timed]))
    figures = {}
    for name, value in zip(KERNEL_FIELDS, values.tolist(), strict=False):
        is_rate = name.endswith("_per_s")
        figures[f"{kernel}_{name}"] = (1 / value if value else 0.0) if is_rate else value
    if not figures[f"{kernel}_bytes_per_s"]:
        figures[f"{kernel}_bytes_per_s"] = 1e15  # nothing to be measured beside the other terms
    return figures


def _term(field_name: str, case: Case, optimizer: str) -> float:
    """Seconds of a case if this one figure were 1 and the others cost nothing."""
    values = {"row_s": 0.0, "bytes_per_s": math.inf} | {field_name: 1.0}
    touched = touched_row_bytes(4, case.num_columns, optimizer)
    one_table = kernel_s(
        KernelRates(**values),
        num_rows=case.num_rows,
        num_columns=case.num_columns,
        num_ids=case.batch_size * case.pooling_factor,
        num_bags=case.batch_size,
        row_bytes=4 * case.num_columns,
        touched_bytes=touched,
    )
    return case.num_tables * one_table


def _make_tables(optimizer: str, case: Case, device: torch.device) -> SplitTableBatchedEmbeddingBagsCodegen:
    on_gpu = device.type == "cuda"
    location = EmbeddingLocation.DEVICE if on_gpu else EmbeddingLocation.HOST
    compute = ComputeDevice.CUDA if on_gpu else ComputeDevice.CPU
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(case.num_rows, case.num_columns, location, compute)] * case.num_tables,
        optimizer=OPTIMIZERS[optimizer],
        learning_rate=0.01,
        device=device,
    )
    for weights in tables.split_embedding_weights():
        weights.fill_(0.01)  # or the kernel would give no memory to the pages
    speed_up_rowwise_adagrad(nn.ModuleList([tables]))
    return tables


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
