"""Groups of ranks that each hold all tables, against plain PyTorch that holds a copy for each group."""

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from papilio.data_pipeline.loading.batch import Batch
from papilio.data_pipeline.loading.order import ReadPosition
from papilio.sharding.runtime.initial_weights import initial_weights, initialize_tables
from papilio.trainer.config import OptimizerConfig, ScheduleConfig
from papilio.trainer.models.train_model import TrainModel
from papilio.trainer.optimizers import Optimizers, fuse_sparse_optimizer
from papilio.trainer.sharded_model import shard
from tests.support.plans import make_plan
from tests.support.reference import SparseReference, pool_bags

ROWS = {"a": 40, "b": 11}
DIM = 8
RATE = 0.5
EPS = 1e-6
BATCH = 8
NUM_STEPS = 5
KEY = "model.tables.embedding_bags.t_{}.weight"


class Clicks(nn.Module):
    """Pooled embeddings and a linear layer."""

    def __init__(self):
        super().__init__()
        tables = [
            EmbeddingBagConfig(name=f"t_{name}", feature_names=[name], num_embeddings=rows, embedding_dim=DIM)
            for name, rows in ROWS.items()
        ]
        self.tables = EmbeddingBagCollection(tables, device=torch.device("meta"))
        self.linear = nn.Linear(DIM * len(ROWS), 1)
        with torch.no_grad():
            self.linear.weight.copy_(torch.linspace(-1, 1, DIM * len(ROWS)))
            self.linear.bias.zero_()

    def forward(self, dense, sparse):
        pooled = self.tables(sparse)
        return self.linear(torch.cat([pooled[name] for name in ROWS], dim=1)).squeeze(1)


def samples_of(step):
    """Ids and lengths by feature, and labels, of a global batch."""
    generator = torch.Generator().manual_seed(step)
    lengths = {name: torch.randint(0, 4, (BATCH,), generator=generator) for name in ROWS}
    ids = {n: torch.randint(0, rows, (int(lengths[n].sum()),), generator=generator) for n, rows in ROWS.items()}
    return ids, lengths, torch.randint(0, 2, (BATCH,), generator=generator).float()


def cut(ids, lengths, start, stop):
    """Bags `start` to `stop` of a feature."""
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    return ids[bounds[start] : bounds[stop]], lengths[start:stop]


def batch_of(step, rank, world_size):
    ids, lengths, labels = samples_of(step)
    size = BATCH // world_size
    slices = [cut(ids[name], lengths[name], rank * size, (rank + 1) * size) for name in ROWS]
    values, counts = (torch.cat(parts).int() for parts in zip(*slices, strict=True))
    features = KeyedJaggedTensor(list(ROWS), values, lengths=counts)
    own = labels[rank * size : (rank + 1) * size]
    return Batch(torch.zeros(size, 1), features, own, ReadPosition(), BATCH, size)


def train(ranks, group_size, sharding_type, optimizer, sync_every):
    """Train and return this rank's shards (table, first row, first column, weights) and the linear layer's weights."""
    model = TrainModel(Clicks(), ranks.world_size, None, "cpu")
    config = OptimizerConfig.model_validate(
        {
            "sparse": {"name": optimizer, "learning_rate": RATE, "eps": EPS},
            "dense": {"name": "sgd", "learning_rate": RATE},
        }
    )
    fuse_sparse_optimizer(model.model.tables, config.sparse)
    types = dict.fromkeys(("t_a", "t_b"), sharding_type)
    plan = make_plan(model, types, group_size, min(group_size, ranks.local_world_size))
    sharded = shard(model, plan, ranks.device, group_size=group_size)
    initialize_tables(sharded, seed=3)
    optimizers = Optimizers(sharded, config, ScheduleConfig())
    for step in range(NUM_STEPS):
        optimizers.set_step(step)
        optimizers.combined.zero_grad()
        loss, _ = sharded(batch_of(step, ranks.rank, ranks.world_size))
        loss.backward()
        if sync_every and (step + 1) % sync_every == 0:
            sharded.sync()
        optimizers.combined.step()
    state = sharded.state_dict()
    local = {name: state[KEY.format(name)].to_local() for name in ROWS}
    shards = [
        (name, *offsets, shard.detach().clone())
        for name, found in local.items()
        for shard, offsets in zip(found.local_shards(), found.local_offsets(), strict=False)
    ]
    return shards, state["model.linear.weight"].detach().clone()


def train_reference(num_groups, optimizer, sync_every):
    """A copy of the tables for each group, each trained on its own samples as if they were the whole batch."""
    start = {n: initial_weights(KEY.format(n), 3, rows, DIM, torch.device("cpu")) for n, rows in ROWS.items()}
    copies = [{name: weight.clone() for name, weight in start.items()} for _ in range(num_groups)]
    sparse = [{n: SparseReference(optimizer, RATE, EPS, w) for n, w in copy.items()} for copy in copies]
    linear = Clicks().linear
    size = BATCH // num_groups
    for step in range(NUM_STEPS):
        ids, lengths, labels = samples_of(step)
        linear.zero_grad()
        for group, copy in enumerate(copies):
            leaves = {name: weight.clone().requires_grad_() for name, weight in copy.items()}
            slices = {n: cut(ids[n], lengths[n], group * size, (group + 1) * size) for n in ROWS}
            pooled = torch.cat([pool_bags(leaves[n], *slices[n], "sum") for n in ROWS], dim=1)
            loss = cross_entropy(linear(pooled).squeeze(1), labels[group * size : (group + 1) * size])
            # The tables see the mean over the group's samples, the linear layer the mean over all.
            (loss / num_groups).backward()
            for name, weight in copy.items():
                sparse[group][name].step(weight, num_groups * leaves[name].grad)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.sub_(RATE * parameter.grad)
        if sync_every and (step + 1) % sync_every == 0:
            for name in ROWS:
                mean = torch.stack([copy[name] for copy in copies]).mean(0)
                state = torch.stack([of[name].state for of in sparse]).mean(0)
                for copy, of in zip(copies, sparse, strict=True):
                    copy[name].copy_(mean)
                    of[name].state.copy_(state)
    return copies, linear.weight.detach()


def check_shards(shards, tables):
    for name, row, column, weights in shards:
        num_rows, num_columns = weights.shape
        whole = tables[name][row : row + num_rows, column : column + num_columns]
        torch.testing.assert_close(weights, whole, rtol=1e-5, atol=1e-6)


def check(pool, group_size, sharding_type, optimizer, sync_every):
    results = pool.run(train, group_size, sharding_type, optimizer, sync_every)
    copies, linear = train_reference(pool.world_size // group_size, optimizer, sync_every)
    for rank, (shards, found) in enumerate(results):
        torch.testing.assert_close(found, linear, rtol=1e-5, atol=1e-6)
        check_shards(shards, copies[rank // group_size])
    num_weights = sum(shard[-1].numel() for shards, _ in results[:group_size] for shard in shards)
    assert num_weights == DIM * sum(ROWS.values()), "a group holds all tables"


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adagrad"])
@pytest.mark.parametrize("sync_every", [1, 2, None], ids=["every step", "every other", "independent"])
def test_two_groups_of_two(four_ranks, optimizer, sync_every):
    check(four_ranks, 2, "row_wise", optimizer, sync_every)


@pytest.mark.parametrize("sharding_type", ["table_wise", "column_wise"])
def test_groups_shard_in_any_way(four_ranks, sharding_type):
    check(four_ranks, 2, sharding_type, "sgd", 2)


def test_groups_of_one_rank(two_ranks):
    check(two_ranks, 1, "table_wise", "rowwise_adagrad", None)


def test_sgd_averaged_after_every_step_is_the_step_of_the_whole_batch(four_ranks):
    """Independent of the reference with groups: one copy of the tables, the whole batch, plain SGD."""
    one_copy, linear = train_reference(1, "sgd", None)
    for shards, found in four_ranks.run(train, 2, "table_wise", "sgd", 1):
        torch.testing.assert_close(found, linear, rtol=1e-5, atol=1e-6)
        check_shards(shards, one_copy[0])
