import math

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.modules.embedding_configs import DataType

from papilio.sharding.runtime import initial_weights as module
from papilio.sharding.runtime.initial_weights import initial_weights, initialize_tables
from papilio.trainer.sharded_model import shard
from tests.support.plans import SHARDING_TYPES, make_plan

CPU = torch.device("cpu")


def test_a_shard_holds_its_part_of_the_whole(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", 8)
    whole = initial_weights("t", 5, 45, 12, CPU)
    for row, column, rows, columns in [(0, 0, 45, 12), (7, 4, 10, 4), (16, 0, 8, 12), (40, 8, 5, 4)]:
        shard = torch.empty(rows, columns)
        module._fill(shard, "t", 5, row, column, 45, 12)
        assert torch.equal(shard, whole[row : row + rows, column : column + columns])


def test_weights_are_uniform_within_one_over_the_root_of_the_rows():
    weights = initial_weights("t", 0, 40_000, 8, CPU)
    bound = math.sqrt(1 / 40_000)
    assert weights.abs().max() <= bound
    # The variance of a uniform distribution on +-b is b^2 / 3; 320,000 draws give it to about 0.3 %.
    assert abs(weights.var().item() / (bound**2 / 3) - 1) < 0.02
    assert not torch.equal(weights[:16_384], weights[16_384:32_768]), "blocks differ"


def test_seed_and_table_decide():
    weights = initial_weights("t", 1, 10, 4, CPU)
    assert torch.equal(weights, initial_weights("t", 1, 10, 4, CPU))
    assert not torch.equal(weights, initial_weights("t", 2, 10, 4, CPU))
    assert not torch.equal(weights, initial_weights("u", 1, 10, 4, CPU))


def pieces_on_rank(ranks, precision, types):
    """This rank's part of each table in the state dict: (first row, first column, values)."""
    tables = [
        EmbeddingBagConfig(
            name=f"t_{name}", feature_names=[name], num_embeddings=21, embedding_dim=8, data_type=precision
        )
        for name in types
    ]
    model = nn.Module()
    model.bags = EmbeddingBagCollection(tables, device=torch.device("meta"))
    types = {f"t_{name}": name for name in types}
    sharded = shard(model, make_plan(model, types, ranks.world_size, ranks.local_world_size), ranks.device)
    initialize_tables(sharded, seed=7)
    pieces = {}
    for name, weight in sharded.state_dict().items():
        shards = weight.local_shards() if hasattr(weight, "local_shards") else None
        corners = [(s.tensor.clone(), *s.metadata.shard_offsets) for s in shards or ()]
        pieces[name] = corners if shards is not None else [(weight.clone(), 0, 0)]
    return pieces


@pytest.mark.parametrize("precision", [DataType.FP32, DataType.FP16])
def test_all_sharding_types_begin_with_the_same_values(four_ranks, precision):
    results = four_ranks.run(pieces_on_rank, precision, SHARDING_TYPES)
    dtype = torch.float16 if precision is DataType.FP16 else torch.float32
    for sharding_type in SHARDING_TYPES:
        name = f"bags.embedding_bags.t_{sharding_type}.weight"
        whole = initial_weights(name, 7, 21, 8, CPU).to(dtype)
        covered = torch.zeros(21, 8)
        for values, row, column in (piece for pieces in results for piece in pieces[name]):
            rows, columns = slice(row, row + values.shape[0]), slice(column, column + values.shape[1])
            assert torch.equal(values, whole[rows, columns]), sharding_type
            covered[rows, columns] += 1
        # Every rank has the whole of a data_parallel table.
        assert torch.equal(covered, torch.full((21, 8), 4.0 if sharding_type == "data_parallel" else 1.0))
