"""FBGEMM's row-wise Adagrad on a CPU: its own backward against the one Papilio gives it, and against SGD's.

    python -m benchmarks.rowwise_adagrad_kernel [--dims 16 64 128] [--batch-size 2048] [--runs 21]

26 tables of 100,000 rows, one id a sample and table, one thread; milliseconds of a backward pass with its update, the
kernels taking turns, medians. sharding/runtime/rowwise_adagrad.py says why; benchmarks/sse_avx_mix.c shows the cause
alone.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from papilio.sharding.runtime.rowwise_adagrad import speed_up_rowwise_adagrad

NUM_TABLES = 26
NUM_ROWS = 100_000
NUM_BATCHES = 10
WARMUP_RUNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'dim':>5}{'sgd fp32':>12}{'stock fp32':>12}{'stock fp16':>12}{'papilio fp32':>14}{'stock / papilio':>18}")
    for dim in options.dims:
        kernels = make_kernels(dim)
        times = measure(kernels, dim, options)
        sgd, stock, half, fast = (times[name] for name in ("sgd", "stock", "half", "fast"))
        print(f"{dim:>5}{sgd:>12.1f}{stock:>12.1f}{half:>12.1f}{fast:>14.1f}{stock / fast:>17.1f}x")


def make_kernels(dim: int) -> dict[str, SplitTableBatchedEmbeddingBagsCodegen]:
    rowwise, half = EmbOptimType.EXACT_ROWWISE_ADAGRAD, SparseType.FP16
    kernels = {
        "sgd": make_tbe(dim, EmbOptimType.EXACT_SGD, SparseType.FP32),
        "stock": make_tbe(dim, rowwise, SparseType.FP32),
        "half": make_tbe(dim, rowwise, half),
        "fast": make_tbe(dim, rowwise, SparseType.FP32),
    }
    assert speed_up_rowwise_adagrad(torch.nn.ModuleList([kernels["fast"]])) == 1
    return kernels


def make_tbe(dim: int, optimizer: EmbOptimType, precision: SparseType) -> SplitTableBatchedEmbeddingBagsCodegen:
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(NUM_ROWS, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * NUM_TABLES,
        optimizer=optimizer,
        weights_precision=precision,
        learning_rate=0.01,
    )


def measure(
    kernels: dict[str, SplitTableBatchedEmbeddingBagsCodegen], dim: int, options: argparse.Namespace
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    num_ids = NUM_TABLES * options.batch_size
    batches = [torch.randint(0, NUM_ROWS, (num_ids,), generator=generator) for _ in range(NUM_BATCHES)]
    offsets = torch.arange(num_ids + 1)
    gradient = torch.randn(options.batch_size, NUM_TABLES * dim, generator=generator) * 1e-3
    times: dict[str, list[float]] = {name: [] for name in kernels}
    for run in range(WARMUP_RUNS + options.runs):
        for name, tbe in kernels.items():
            pooled = tbe(batches[run % NUM_BATCHES], offsets)
            begin_s = time.perf_counter()
            pooled.backward(gradient.to(pooled.dtype))
            times[name].append((time.perf_counter() - begin_s) * 1e3)
    return {name: statistics.median(found[WARMUP_RUNS:]) for name, found in times.items()}


if __name__ == "__main__":
    main()
