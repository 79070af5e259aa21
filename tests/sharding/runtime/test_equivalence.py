"""Sharded tables compute what unsharded ones do: every sharding type, optimizer and pooling, on real ranks."""

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.types import ShardingType

from papilio.sharding.runtime.initial_weights import initial_weights, initialize_tables
from papilio.sharding.runtime.sharders import BagSharder
from papilio.trainer.config import SparseOptimizerConfig
from papilio.trainer.models.build import DATA_TYPES, POOLING_TYPES
from papilio.trainer.optimizers import fuse_sparse_optimizer, make_sparse_optimizer
from papilio.trainer.sharded_model import shard
from tests.support.plans import NUM_COLUMN_BLOCKS, SHARDING_TYPES, make_plan
from tests.support.reference import SparseReference, pool_bags

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad")
POOLINGS = ("sum", "mean")
DIM = 8
LEARNING_RATE = 0.1
EPS = 1e-6
# Samples of each rank at each step; all slices are padded to the longest with empty bags, as the loader does.
SLICES = {
    2: [(6, 6), (5, 4), (1, 0), (2, 2), (7, 7)],
    4: [(4, 4, 4, 4), (3, 2, 0, 0), (1, 0, 0, 0), (2, 2, 2, 2), (5, 5, 5, 5)],
}
STEP_WITHOUT_IDS = 3


@dataclass(frozen=True)
class Table:
    rows: int
    sharding_type: str
    pooling: str


@dataclass(frozen=True)
class Case:
    """Tables by feature name, and what updates them."""

    tables: dict[str, Table] = field(hash=False)
    optimizer: str
    precision: str = "fp32"


def one_type(sharding_type, optimizer, pooling):
    """Tables of which some, cut by rows over four ranks, leave ranks without any; a single row is no grid."""
    rows_by_name = {"a": 50, "b": 23, "c": 11, "d": 5, **({"e": 1} if sharding_type != "grid_shard" else {})}
    tables = {name: Table(rows, sharding_type, pooling) for name, rows in rows_by_name.items()}
    return Case(tables, optimizer)


def all_types(optimizer, precision="fp32"):
    """A table of each type and pooling in one model, but for what is refused."""
    kinds = itertools.product(POOLINGS, SHARDING_TYPES[precision != "fp32" :])
    return Case({f"{p}_{t}": Table(9 + 2 * i, t, p) for i, (p, t) in enumerate(kinds)}, optimizer, precision)


class Bags(nn.Module):
    """Concatenated pooled embeddings, in the features' order."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.names = list(case.tables)
        tables = [
            EmbeddingBagConfig(
                name=name,
                feature_names=[name],
                num_embeddings=table.rows,
                embedding_dim=DIM,
                pooling=POOLING_TYPES[table.pooling],
                data_type=DATA_TYPES[case.precision],
            )
            for name, table in case.tables.items()
        ]
        self.embedding_bag_collection = EmbeddingBagCollection(tables, device=torch.device("meta"))

    def forward(self, features):
        pooled = self.embedding_bag_collection(features)
        return torch.cat([pooled[name] for name in self.names], dim=1)


def make_samples(case, step, size):
    """Bags of 0 to 3 ids per feature, and an upstream gradient, of one global batch."""
    generator = torch.Generator().manual_seed(100 + step)
    longest = 0 if step == STEP_WITHOUT_IDS else 3
    lengths = {name: torch.randint(0, longest + 1, (size,), generator=generator) for name in case.tables}
    ids = {
        name: torch.randint(0, table.rows, (int(lengths[name].sum()),), generator=generator, dtype=torch.int32)
        for name, table in case.tables.items()
    }
    return lengths, ids, torch.randn(size, DIM * len(case.tables), generator=generator)


def take(lengths, ids, start, stop, padded_size):
    """Cut a rank's samples out of a global batch, and pad them with empty bags."""
    cut_ids, cut_lengths = [], []
    for name in lengths:
        bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths[name].cumsum(0)])
        cut_ids.append(ids[name][bounds[start] : bounds[stop]])
        cut_lengths.append(nn.functional.pad(lengths[name][start:stop], (0, padded_size - (stop - start))))
    return KeyedJaggedTensor(list(lengths), torch.cat(cut_ids), lengths=torch.cat(cut_lengths).int())


def train_sharded(ranks, case):
    """Train and return this rank's outputs, without padding, by step, and the ranks that hold shards."""
    model = Bags(case)
    config = SparseOptimizerConfig(name=case.optimizer, learning_rate=LEARNING_RATE, eps=EPS)
    fuse_sparse_optimizer(model.embedding_bag_collection, config)
    types = {name: table.sharding_type for name, table in case.tables.items()}
    plan = make_plan(model, types, ranks.world_size, ranks.local_world_size)
    sharded = shard(model, plan, ranks.device)
    initialize_tables(sharded, seed=3)
    optimizer = make_sparse_optimizer(sharded, config)
    outputs = []
    for step, sizes in enumerate(SLICES[ranks.world_size]):
        start = sum(sizes[: ranks.rank])
        size = sizes[ranks.rank]
        lengths, ids, gradient = make_samples(case, step, sum(sizes))
        optimizer.zero_grad()
        pooled = sharded(take(lengths, ids, start, start + size, max(sizes)))[:size]
        # TorchRec averages gradients over ranks; the reference sums them.
        (pooled * gradient[start : start + size]).sum().mul(ranks.world_size).backward()
        optimizer.step()
        outputs.append(pooled.detach())
    return outputs, {rank for p in plan.plan.values() for sharding in p.values() for rank in sharding.ranks}


def train_reference(case, sizes_by_step):
    """The same steps on whole tables; row-wise Adagrad keeps one state per row and column block."""
    key = "embedding_bag_collection.embedding_bags.{}.weight"
    weights = {
        name: initial_weights(key.format(name), 3, table.rows, DIM, torch.device("cpu"))
        for name, table in case.tables.items()
    }
    blocks = {}
    for name, table in case.tables.items():
        width = DIM // NUM_COLUMN_BLOCKS.get(table.sharding_type, 1)
        for columns in (slice(start, start + width) for start in range(0, DIM, width)):
            reference = SparseReference(case.optimizer, LEARNING_RATE, EPS, weights[name][:, columns])
            blocks[name, columns.start] = (columns, reference)
    outputs = []
    for step, sizes in enumerate(sizes_by_step):
        if case.precision == "fp16":
            weights = {name: weight.half().float() for name, weight in weights.items()}
        lengths, ids, gradient = make_samples(case, step, sum(sizes))
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        pooled = torch.cat(
            [pool_bags(leaves[n], ids[n], lengths[n], table.pooling) for n, table in case.tables.items()], dim=1
        )
        (pooled * gradient).sum().backward()
        for (name, _), (columns, reference) in blocks.items():
            reference.step(weights[name][:, columns], leaves[name].grad[:, columns])
        outputs.append(pooled.detach())
    return outputs


def check(pool, case, rtol=2e-5, atol=2e-6):
    """Train both ways and compare all outputs, the later of which depend on the earlier steps' updates."""
    results = pool.run(train_sharded, case)
    for step, whole in enumerate(train_reference(case, SLICES[pool.world_size])):
        found = torch.cat([outputs[step] for outputs, _ in results])
        assert found.dtype == torch.float32
        for name, one, other in zip(case.tables, found.split(DIM, 1), whole.split(DIM, 1), strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=lambda m: f"{name}, step {step}: {m}")  # noqa: B023
    assert results[0][1] == set(range(pool.world_size)), "all ranks hold shards"


@pytest.mark.parametrize("sharding_type", SHARDING_TYPES)
def test_two_ranks_train_as_one_unsharded_model(two_ranks, sharding_type):
    for optimizer, pooling in itertools.product(OPTIMIZERS, POOLINGS):
        check(two_ranks, one_type(sharding_type, optimizer, pooling))


@pytest.mark.parametrize("sharding_type", SHARDING_TYPES)
def test_four_ranks_on_two_hosts_train_as_one_unsharded_model(four_ranks, sharding_type):
    for optimizer, pooling in itertools.product(OPTIMIZERS, POOLINGS):
        check(four_ranks, one_type(sharding_type, optimizer, pooling))


@pytest.mark.parametrize("pool", ["two_ranks", "four_ranks"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_all_types_and_poolings_train_together(request, pool, optimizer):
    """Here mean pooling of a table cut by rows would change the other tables' outputs, if TorchRec had its way."""
    check(request.getfixturevalue(pool), all_types(optimizer))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_tables_of_half_precision_train_to_its_accuracy(four_ranks, optimizer):
    """Against weights rounded to nearest after each step: FBGEMM rounds stochastically on a GPU only."""
    check(four_ranks, all_types(optimizer, "fp16"), rtol=2e-3, atol=2e-3)


def test_the_sharder_allows_uvm_on_a_gpu_only():
    sharder = BagSharder()
    assert set(sharder.sharding_types("cpu")) == set(sharder.sharding_types("cuda")) == set(SHARDING_TYPES)
    for sharding_type in ShardingType:
        is_replica = sharding_type is ShardingType.DATA_PARALLEL
        fused = ["fused", "fused_uvm", "fused_uvm_caching"]
        assert sharder.compute_kernels(sharding_type.value, "cpu") == (["dense"] if is_replica else ["fused"])
        assert sharder.compute_kernels(sharding_type.value, "cuda") == (["dense"] if is_replica else fused)
