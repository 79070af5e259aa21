"""A small click model whose tables are sharded by hand, in every way at once, with uneven batches to train it on."""

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from papilio.data_pipeline.loading.batch import Batch
from papilio.data_pipeline.loading.order import ReadPosition
from papilio.sharding.runtime.initial_weights import initialize_tables
from papilio.trainer.config import DenseOptimizerConfig, OptimizerConfig, ScheduleConfig, SparseOptimizerConfig
from papilio.trainer.models.build import POOLING_TYPES
from papilio.trainer.models.train_model import TrainModel
from papilio.trainer.optimizers import Optimizers, fuse_sparse_optimizer
from papilio.trainer.sharded_model import ShardedModel, shard
from tests.support.plans import SHARDING_TYPES, make_plan

DIM = 8
NUM_DENSE = 3
TABLES = {f"{pooling}_{name}": (7 + i, pooling) for i, name in enumerate(SHARDING_TYPES) for pooling in POOLING_TYPES}
EVERY_TYPE = {f"t_{name}": name.partition("_")[2] for name in TABLES}
# Samples of each rank; padded to the longest.
SLICES = {
    1: [(10,), (5,), (1,), (12,)],
    2: [(5, 5), (3, 2), (1, 0), (6, 6)],
    4: [(3, 3, 3, 3), (2, 2, 1, 0), (1, 0, 0, 0), (4, 4, 4, 3)],
}
SCHEDULE = ScheduleConfig(warmup_steps=2, decay_start_step=3, decay_steps=4)
SPARSE_KEY = "model.embedding_bag_collection.embedding_bags.t_{}.weight"


class Clicks(nn.Module):
    """A linear model of the dense inputs and all pooled embeddings."""

    def __init__(self) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(
                name=f"t_{name}",
                feature_names=[name],
                num_embeddings=rows,
                embedding_dim=DIM,
                pooling=POOLING_TYPES[pooling],
            )
            for name, (rows, pooling) in TABLES.items()
        ]
        self.embedding_bag_collection = EmbeddingBagCollection(tables, device=torch.device("meta"))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(NUM_DENSE + DIM * len(TABLES), 1)

    def forward(self, dense, sparse):
        pooled = self.embedding_bag_collection(sparse)
        return self.linear(torch.cat([dense, *(pooled[name] for name in TABLES)], dim=1)).squeeze(1)


def make_samples(step, size):
    """Dense inputs, (ids, lengths) of each feature, labels."""
    generator = torch.Generator().manual_seed(step)
    bags = {}
    for name, (rows, _) in TABLES.items():
        lengths = torch.randint(0, 3, (size,), generator=generator, dtype=torch.int32)
        bags[name] = (torch.randint(0, rows, (int(lengths.sum()),), generator=generator, dtype=torch.int32), lengths)
    labels = torch.randint(0, 2, (size,), generator=generator).float()
    return torch.randn(size, NUM_DENSE, generator=generator), bags, labels


def slice_of(step, sizes, rank):
    """A rank's batch, padded as the loader pads it."""
    dense, bags, labels = make_samples(step, sum(sizes))
    start, stop = sum(sizes[:rank]), sum(sizes[: rank + 1])
    ids, lengths = [], []
    for bag_ids, bag_lengths in bags.values():
        bounds = [0, *bag_lengths.cumsum(0).tolist()]
        ids.append(bag_ids[bounds[start] : bounds[stop]])
        lengths.append(bag_lengths[start:stop])
    sparse = KeyedJaggedTensor(list(TABLES), torch.cat(ids), lengths=torch.cat(lengths), stride=stop - start)
    batch = Batch(dense[start:stop], sparse, labels[start:stop], ReadPosition(), sum(sizes), stop - start)
    return batch.padded_to(max(sizes))


def optimizer_config(name):
    """The dense optimizer is another one with other settings: a table that it got would differ."""
    sparse = SparseOptimizerConfig(name=name, learning_rate=0.2, eps=1e-4)
    return OptimizerConfig(sparse=sparse, dense=DenseOptimizerConfig(name="sgd", learning_rate=0.5))


def shard_clicks(ranks, types, config):
    """Return the model on this rank and its optimizers."""
    model = Clicks()
    fuse_sparse_optimizer(model.embedding_bag_collection, config.sparse)
    step_model = TrainModel(model, ranks.world_size, None, "cpu")
    plan = make_plan(step_model, types, ranks.world_size, ranks.local_world_size)
    module = shard(step_model, plan, ranks.device)
    initialize_tables(module, seed=3)
    return ShardedModel(module, None), Optimizers(module, config, SCHEDULE)


def train_steps(ranks, model, optimizers, steps):
    """Train some of the steps of SLICES and return the global losses."""
    losses = []
    for step in steps:
        sizes = SLICES[ranks.world_size][step]
        optimizers.set_step(step)
        optimizers.combined.zero_grad()
        loss, _ = model.module(slice_of(step, sizes, ranks.rank))
        loss.backward()
        optimizers.combined.step()
        losses.append(sum(ranks.gather(loss.item())) / ranks.world_size)
    return losses
