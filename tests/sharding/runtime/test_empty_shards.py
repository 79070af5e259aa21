"""Table-batched embeddings with tables that have no rows, as the last ranks of a table cut by rows get them."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn

from papilio.sharding.runtime.empty_shards import fix_empty_shards
from papilio.sharding.runtime.rowwise_adagrad import speed_up_rowwise_adagrad
from tests.support.reference import SparseReference, pool_bags

OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}
BATCH_SIZE = 3


def make_tbe(shapes, optimizer, precision=SparseType.FP32):
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(*shape, EmbeddingLocation.HOST, ComputeDevice.CPU) for shape in shapes],
        optimizer=OPTIMIZERS[optimizer],
        learning_rate=0.1,
        eps=1e-6,
        weights_precision=precision,
    )


def holder(tbe):
    model = nn.Module()
    model.tbe = tbe
    fix_empty_shards(model)
    return model


@pytest.mark.parametrize("is_fast", [False, True], ids=["stock", "fast"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "shapes",
    [
        [(5, 8), (4, 8), (0, 8)],
        [(5, 8), (0, 8), (0, 8)],
        [(0, 8), (5, 8), (4, 8)],
        # Here FBGEMM would take the columns of the second table for those of the third.
        [(5, 8), (0, 16), (4, 8)],
        [(5, 16), (0, 4), (4, 8), (0, 4)],
    ],
)
def test_the_other_tables_are_trained(shapes, optimizer, is_fast):
    tbe = make_tbe(shapes, optimizer)
    model = holder(tbe)
    if is_fast:
        speed_up_rowwise_adagrad(model)
    weights = []
    for weight in tbe.split_embedding_weights():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        weights.append(weight.clone())
    references = [SparseReference(optimizer, 0.1, 1e-6, weight) for weight in weights]
    lengths = [torch.tensor([2, 0, 3] if rows else [0] * BATCH_SIZE) for rows, _ in shapes]
    ids = [torch.arange(int(found.sum())) % max(rows, 1) for found, (rows, _) in zip(lengths, shapes, strict=True)]
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.cat(lengths).cumsum(0)])
    for _ in range(3):
        leaves = [weight.clone().requires_grad_() for weight in weights]
        expected = torch.cat([pool_bags(*bags, "sum") for bags in zip(leaves, ids, lengths, strict=True)], dim=1)
        found = tbe(torch.cat(ids), offsets)
        torch.testing.assert_close(found, expected)
        slopes = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
        (found * slopes).sum().backward()
        (expected * slopes).sum().backward()
        for weight, leaf, reference in zip(weights, leaves, references, strict=True):
            reference.step(weight, leaf.grad)


@pytest.mark.parametrize("precision", [SparseType.FP32, SparseType.FP16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_rank_without_any_row_takes_part(optimizer, precision):
    tbe = make_tbe([(0, 8), (0, 4)], optimizer, precision)
    model = holder(tbe)
    speed_up_rowwise_adagrad(model)
    pooled = tbe(torch.empty(0, dtype=torch.long), torch.zeros(2 * BATCH_SIZE + 1, dtype=torch.long))
    assert torch.equal(pooled, torch.zeros(BATCH_SIZE, 12))
    pooled.sum().backward()
    assert [weight.shape for weight in tbe.split_embedding_weights()] == [(0, 8), (0, 4)]
