"""Sharded tables compute what unsharded ones do: every sharding type, optimizer and pooling, on real ranks."""

import itertools

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan

from sharding.config import ShardingConfig
from sharding.initial_weights import initial_weights, initialize_tables
from sharding.planner import make_plan
from sharding.rowwise_adagrad import speed_up_rowwise_adagrad
from sharding.sharders import BagSharder
from tests.support.reference import SparseReference, pool_bags
from trainer.config import SparseOptimizerConfig
from trainer.models.build import POOLING_TYPES
from trainer.optimizers import fuse_sparse_optimizer

ROWS = {"a": 50, "b": 23, "c": 7}
DIM = 8
EPS = 1e-6
LEARNING_RATE = 0.1
SHARDING_TYPES = ("table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise")
# Slices of the ranks in each step's global batch: alike in size (the loader pads them).
SLICES = {2: [(6, 6), (5, 5), (1, 1), (2, 2), (9, 9)], 3: [(4, 4, 4), (1, 1, 1), (2, 2, 2), (2, 2, 2), (5, 5, 5)]}
STEP_OF_EMPTY_BAGS = 3


class Bags(nn.Module):
    """Concatenated pooled embeddings, in the features' order."""

    def __init__(self, pooling: str) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(
                name=f"t_{name}",
                feature_names=[name],
                num_embeddings=rows,
                embedding_dim=DIM,
                pooling=POOLING_TYPES[pooling],
            )
            for name, rows in ROWS.items()
        ]
        self.embedding_bag_collection = EmbeddingBagCollection(tables, device=torch.device("meta"))

    def forward(self, features):
        pooled = self.embedding_bag_collection(features)
        return torch.cat([pooled[name] for name in ROWS], dim=1)


def make_samples(step, size):
    """Bags of 0 to 3 ids per feature, and an upstream gradient, of one global batch."""
    generator = torch.Generator().manual_seed(100 + step)
    longest = 0 if step == STEP_OF_EMPTY_BAGS else 3
    lengths = {name: torch.randint(0, longest + 1, (size,), generator=generator) for name in ROWS}
    ids = {
        name: torch.randint(0, rows, (int(lengths[name].sum()),), generator=generator, dtype=torch.int32)
        for name, rows in ROWS.items()
    }
    return lengths, ids, torch.randn(size, DIM * len(ROWS), generator=generator)


def take(lengths, ids, start, stop):
    """Cut a rank's samples out of a global batch."""
    cut = {}
    for name in ROWS:
        bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths[name].cumsum(0)])
        cut[name] = ids[name][bounds[start] : bounds[stop]]
    return KeyedJaggedTensor(
        list(ROWS), torch.cat(list(cut.values())), lengths=torch.cat([lengths[n][start:stop] for n in ROWS]).int()
    )


def shard_bags(ranks, sharding_type, optimizer, pooling):
    model = Bags(pooling)
    config = SparseOptimizerConfig(name=optimizer, learning_rate=LEARNING_RATE, eps=EPS)
    fuse_sparse_optimizer(model.embedding_bag_collection, config)
    plan: ShardingPlan = make_plan(
        model,
        ShardingConfig(types=(sharding_type,), min_partition=4),
        device=ranks.device,
        local_world_size=ranks.local_world_size,
        local_batch_size=8,
        group=ranks.group,
    )
    sharded = DistributedModelParallel(model, device=ranks.device, plan=plan, sharders=[BagSharder()])
    speed_up_rowwise_adagrad(sharded)
    initialize_tables(sharded, seed=3)
    return sharded, plan


def train_sharded(ranks, sharding_type, optimizer, pooling):
    """Train and return this rank's outputs by step, and the ranks that hold shards."""
    sharded, plan = shard_bags(ranks, sharding_type, optimizer, pooling)
    outputs = []
    for step, sizes in enumerate(SLICES[ranks.world_size]):
        start = sum(sizes[: ranks.rank])
        stop = start + sizes[ranks.rank]
        lengths, ids, gradient = make_samples(step, sum(sizes))
        pooled = sharded(take(lengths, ids, start, stop))
        # TorchRec averages gradients over ranks; the reference sums them.
        (pooled * gradient[start:stop]).sum().mul(ranks.world_size).backward()
        outputs.append(pooled.detach())
    holders = {rank for p in plan.plan.values() for sharding in p.values() for rank in sharding.ranks}
    return outputs, sorted(holders)


def train_reference(optimizer, pooling, sizes_by_step, column_blocks):
    """The same steps on whole tables; row-wise Adagrad keeps one state per row and column block."""
    key = "embedding_bag_collection.embedding_bags.t_{}.weight"
    cpu = torch.device("cpu")
    weights = {n: initial_weights(key.format(n), 3, rows, DIM, cpu) for n, rows in ROWS.items()}
    width = DIM // column_blocks
    optimizers = {
        (n, block): SparseReference(optimizer, LEARNING_RATE, EPS, weights[n][:, block * width : (block + 1) * width])
        for n in ROWS
        for block in range(column_blocks)
    }
    outputs = []
    for step, sizes in enumerate(sizes_by_step):
        lengths, ids, gradient = make_samples(step, sum(sizes))
        leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
        pooled = torch.cat([pool_bags(leaves[n], ids[n], lengths[n], pooling) for n in ROWS], dim=1)
        (pooled * gradient).sum().backward()
        for (name, block), reference in optimizers.items():
            columns = slice(block * width, (block + 1) * width)
            reference.step(weights[name][:, columns], leaves[name].grad[:, columns])
        outputs.append(pooled.detach())
    return outputs


@pytest.mark.parametrize("sharding_type", SHARDING_TYPES)
def test_two_ranks_train_as_one_unsharded_model(two_ranks, sharding_type):
    for optimizer, pooling in itertools.product(("sgd", "adagrad", "rowwise_adagrad"), ("sum", "mean")):
        results = two_ranks.run(train_sharded, sharding_type, optimizer, pooling)
        column_blocks = 2 if "column" in sharding_type else 1
        expected = train_reference(optimizer, pooling, SLICES[2], column_blocks)
        for step, whole in enumerate(expected):
            found = torch.cat([outputs[step] for outputs, _ in results])
            torch.testing.assert_close(found, whole, rtol=2e-5, atol=2e-6, msg=f"{optimizer} {pooling} step {step}")
        assert results[0][1] == [0, 1], "both ranks hold shards"


@pytest.mark.parametrize("sharding_type", ["table_wise", "row_wise"])
def test_three_ranks_train_as_one_unsharded_model(three_ranks, sharding_type):
    results = three_ranks.run(train_sharded, sharding_type, "rowwise_adagrad", "mean")
    for step, whole in enumerate(train_reference("rowwise_adagrad", "mean", SLICES[3], 1)):
        found = torch.cat([outputs[step] for outputs, _ in results])
        torch.testing.assert_close(found, whole, rtol=2e-5, atol=2e-6)
