"""The fast row-wise Adagrad backward against FBGEMM's own and against the formula."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from papilio.sharding.runtime.rowwise_adagrad import speed_up_rowwise_adagrad
from tests.support.reference import SparseReference, pool_bags

ROWS = (40, 3, 17)
EPS = 1e-8


def make_tbe(dim, pooling, optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, **options):
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in ROWS],
        optimizer=optimizer,
        learning_rate=0.1,
        eps=EPS,
        pooling_mode=pooling,
        **options,
    )
    generator = torch.Generator().manual_seed(0)
    for weight in tbe.split_embedding_weights():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    return tbe


def make_bags(step, batch_size=9):
    generator = torch.Generator().manual_seed(step + 1)
    lengths = torch.randint(0, 4, (len(ROWS), batch_size), generator=generator)
    ids = [torch.randint(0, rows, (int(n.sum()),), generator=generator) for rows, n in zip(ROWS, lengths, strict=True)]
    return lengths, ids


@pytest.mark.parametrize("dim", [4, 16, 36])
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
def test_it_follows_the_formula_and_the_stock_kernel(dim, pooling):
    fast, stock = make_tbe(dim, pooling), make_tbe(dim, pooling)
    weights = [weight.clone() for weight in stock.split_embedding_weights()]
    references = [SparseReference("rowwise_adagrad", 0.1, EPS, weight) for weight in weights]
    assert speed_up_rowwise_adagrad(torch.nn.ModuleList([fast])) == 1
    mode = "mean" if pooling is PoolingMode.MEAN else "sum"
    for step in range(6):
        lengths, ids = make_bags(step)
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.flatten().cumsum(0)])
        gradient = torch.randn(lengths.shape[1], dim * len(ROWS), generator=torch.Generator().manual_seed(step))
        leaves = [weight.clone().requires_grad_() for weight in weights]
        bags = zip(leaves, ids, lengths, strict=True)
        expected = torch.cat([pool_bags(leaf, table_ids, n, mode) for leaf, table_ids, n in bags], dim=1)
        expected.backward(gradient)
        for reference, weight, leaf in zip(references, weights, leaves, strict=True):
            reference.step(weight, leaf.grad)
        for tbe in (fast, stock):
            pooled = tbe(torch.cat(ids), offsets)
            torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-6)
            pooled.backward(gradient)
    for found, stock_weight, weight in zip(
        fast.split_embedding_weights(), stock.split_embedding_weights(), weights, strict=True
    ):
        torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found, stock_weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast.momentum1_host, stock.momentum1_host, rtol=1e-5, atol=1e-9)


def test_a_batch_without_ids_changes_nothing():
    tbe = make_tbe(8, PoolingMode.SUM)
    before = tbe.weights_host.clone()
    speed_up_rowwise_adagrad(torch.nn.ModuleList([tbe]))
    pooled = tbe(torch.empty(0, dtype=torch.long), torch.zeros(len(ROWS) * 5 + 1, dtype=torch.long))
    pooled.backward(torch.ones_like(pooled))
    assert torch.equal(tbe.weights_host, before)


def test_learning_rate_changes_reach_the_kernel():
    tbe = make_tbe(8, PoolingMode.SUM)
    speed_up_rowwise_adagrad(torch.nn.ModuleList([tbe]))
    tbe.set_learning_rate(0.0)
    before = tbe.weights_host.clone()
    pooled = tbe(torch.zeros(3, dtype=torch.long), torch.arange(4))
    pooled.backward(torch.ones_like(pooled))
    assert torch.equal(tbe.weights_host, before)


def test_other_kernels_stay_as_they_are():
    shared = make_tbe(8, PoolingMode.SUM, feature_table_map=[0, 0, 1, 2])
    sgd = make_tbe(8, PoolingMode.SUM, optimizer=EmbOptimType.EXACT_SGD)
    half = make_tbe(8, PoolingMode.SUM, weights_precision=SparseType.FP16)
    assert speed_up_rowwise_adagrad(torch.nn.ModuleList([shared, sgd, half])) == 0
