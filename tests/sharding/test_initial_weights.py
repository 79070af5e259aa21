import math

import torch

from sharding import initial_weights as module
from sharding.initial_weights import initial_weights

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
