"""Uncalibrated predictions against published rates: how far off the data sheets alone leave us, said plainly.

| published | samples/s | predicted | ratio |
|---|---|---|---|
| torchrec_dlrm, Criteo 1TB, 8 x A100, batch 16384 (its README) | 1.67M | 1.5M | .9 (its step's fixed time was fitted) |
| the same, batch 2048 | 205k | 245k | 1.2 |
| MLPerf DLRM-DCNv2, HugeCTR, 8 x H100, batch 55296 | 13.6M | 3.2M | .24: HugeCTR is no TorchRec; see below |
| the same, 8 x B200 | 22.8M | 4.3M | .19 |

HugeCTR runs a step as a few fused kernels in a CUDA graph, without the 8 ms of launches that TorchRec needs.
"""

import itertools

import pytest

from sharding.config import ShardingConfig
from sharding.hardware import load_hardware
from sharding.planning.job import Cluster, DenseWork, Job, Table
from sharding.planning.planner import predict, prepare, solve
from sharding.planning.search import Solution

CRITEO_ROWS = (40_000_000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40_000_000, 3_067_956, 405_282, 10, 2209, 11938,
               155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12973, 108, 36)  # fmt: skip
MULTI_HOT = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
BOTTOM, TOP, DIM, NUM_DENSE = (512, 256), (1024, 1024, 512, 256), 128, 13
NUM_VECTORS = len(CRITEO_ROWS) + 1


def criteo_job(batch: int, pooling: tuple[int, ...], dense: DenseWork, precision: str) -> Job:
    tables = tuple(
        Table(f"t_{index}", "m", str(index), rows, DIM, pooling_factor=factor)
        for index, (rows, factor) in enumerate(zip(CRITEO_ROWS, pooling, strict=True))
    )
    return Job(tables, dense, NUM_DENSE, batch, precision, "rowwise_adagrad", "adagrad")


def dlrm() -> DenseWork:
    width = DIM + NUM_VECTORS * (NUM_VECTORS - 1) // 2
    layers = (*itertools.pairwise((NUM_DENSE, *BOTTOM, DIM)), *itertools.pairwise((width, *TOP, 1)))
    activations = sum(map(sum, layers)) + NUM_VECTORS * DIM + NUM_VECTORS**2
    return DenseWork(layers, sum(a * b for a, b in layers), NUM_VECTORS, DIM, activations)


def dcn() -> DenseWork:
    width, rank = NUM_VECTORS * DIM, 512
    crosses = ((width, rank), (rank, width)) * 3
    layers = (*itertools.pairwise((NUM_DENSE, *BOTTOM, DIM)), *crosses, *itertools.pairwise((width, *TOP, 1)))
    return DenseWork(layers, sum(a * b for a, b in layers), 0, 0, sum(map(sum, layers)) + 9 * width)


def samples_per_s(job: Job, hardware: str) -> float:
    planning = prepare(job, Cluster(load_hardware(hardware), 1, 8), ShardingConfig())
    solution = solve(planning)
    assert isinstance(solution, Solution)
    return job.global_batch_size / predict(planning, solution).total_s


@pytest.mark.parametrize(("batch", "published"), [(16384, 1.67e6), (2048, 204_800)])
def test_torchrec_on_a100(batch: int, published: float) -> None:
    predicted = samples_per_s(criteo_job(batch, (1,) * 26, dlrm(), "fp32"), "dgx_a100")
    assert 0.75 < predicted / published < 1.33


@pytest.mark.parametrize(("hardware", "published"), [("dgx_h100", 13.6e6), ("dgx_b200", 22.8e6)])
def test_torchrec_is_foretold_to_be_slower_than_hugectr(hardware: str, published: float) -> None:
    predicted = samples_per_s(criteo_job(55296, MULTI_HOT, dcn(), "bf16"), hardware)
    assert 0.1 < predicted / published < 0.5
