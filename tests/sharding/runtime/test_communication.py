"""What quantized communication does to pooled embeddings and to updates, on real ranks."""

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from papilio.sharding.config import CommunicationConfig
from papilio.sharding.planner.errors import PlanError
from papilio.sharding.runtime.communication import check_communication, make_codecs
from papilio.sharding.runtime.initial_weights import initialize_tables
from papilio.trainer.config import SparseOptimizerConfig
from papilio.trainer.optimizers import fuse_sparse_optimizer
from papilio.trainer.sharded_model import shard
from tests.support.plan_files import hand_made, table
from tests.support.plans import make_plan

ROWS = {"a": 40, "b": 11}
DIM = 8
CPU = torch.device("cpu")


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        tables = [
            EmbeddingBagConfig(name=f"t_{name}", feature_names=[name], num_embeddings=rows, embedding_dim=DIM)
            for name, rows in ROWS.items()
        ]
        self.tables = EmbeddingBagCollection(tables, device=torch.device("meta"))

    def forward(self, features):
        pooled = self.tables(features)
        return torch.cat([pooled[name] for name in ROWS], dim=1)


def step(ranks, sharding_type, forward, backward):
    """Return this rank's pooled embeddings before an update by SGD, and after it."""
    model = Bags()
    fuse_sparse_optimizer(model.tables, SparseOptimizerConfig(name="sgd", learning_rate=1.0))
    plan = make_plan(model, dict.fromkeys(("t_a", "t_b"), sharding_type), ranks.world_size, ranks.local_world_size)
    codecs = make_codecs(CommunicationConfig(forward=forward, backward=backward), CPU)
    sharded = shard(model, plan, ranks.device, codecs=codecs)
    initialize_tables(sharded, seed=3)
    generator = torch.Generator().manual_seed(ranks.rank)
    ids = torch.cat([torch.randint(0, rows, (16,), generator=generator) for rows in ROWS.values()])
    features = KeyedJaggedTensor(list(ROWS), ids.int(), lengths=torch.ones(32).int())
    before = sharded(features)
    (before * torch.randn(16, 2 * DIM, generator=generator)).sum().backward()
    return before.detach(), sharded(features).detach()


def errors(pool, sharding_type, forward, backward):
    """Relative errors of pooled embeddings and of what an update changed in them, against fp32."""
    exact = pool.run(step, sharding_type, "fp32", "fp32")
    found = pool.run(step, sharding_type, forward, backward)
    before = torch.cat([first for first, _ in found]), torch.cat([first for first, _ in exact])
    change = torch.cat([b - a for a, b in found]), torch.cat([b - a for a, b in exact])
    return [float((a - b).norm() / b.norm()) for a, b in (before, change)]


TYPES = ["table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "grid_shard"]


@pytest.mark.parametrize("sharding_type", TYPES)
def test_fp16_loses_little_with_every_type(four_ranks, sharding_type):
    forward_error, change_error = errors(four_ranks, sharding_type, "fp16", "fp16")
    # Half precision rounds to 11 bits: a relative error of 2^-11 at most, 2.8e-4 in the mean square.
    assert 1e-6 < forward_error < 2**-11
    assert 1e-6 < change_error < 4 * 2**-11


@pytest.mark.parametrize("sharding_type", ["table_wise", "column_wise", "table_column_wise"])
def test_int8_rounds_to_256_steps_a_row(four_ranks, sharding_type):
    forward_error, change_error = errors(four_ranks, sharding_type, "int8", "int8")
    # Of a uniform row from its least to its greatest value: steps of 1/255 of the range, so errors of 0.1 % of it.
    assert 1e-4 < forward_error < 1e-2
    assert 1e-4 < change_error < 3e-2


def test_only_the_gradients_can_be_quantized(two_ranks):
    forward_error, _ = errors(two_ranks, "table_wise", "fp32", "fp16")
    assert forward_error == 0.0


def test_fp32_needs_no_codec():
    assert make_codecs(CommunicationConfig(), CPU) is None


def refusal(plan, device=CPU, **communication):
    with pytest.raises(PlanError) as caught:
        check_communication(CommunicationConfig(**communication), plan, device)
    return str(caught.value)


def test_bf16_is_refused_on_a_cpu_whatever_made_the_plan():
    plan = hand_made(table("t_a", 0))
    assert "sharding.communication.backward = 'bf16'" in refusal(plan, backward="bf16")
    assert "set fp16" in refusal(plan, forward="bf16")
    check_communication(CommunicationConfig(forward="bf16"), plan, torch.device("cuda"))


@pytest.mark.parametrize("kind", ["row_wise", "table_row_wise", "grid_shard"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_int8_is_refused_for_tables_cut_by_rows(kind, direction):
    plan = hand_made(table("t_a", 0, dim=32), table("t_b", 0, 1, dim=32, kind=kind))
    message = refusal(plan, **{direction: "int8"})
    assert f"sharding.communication.{direction} = 'int8'" in message
    assert f"the plan makes t_b {kind}; make the plan again with it, or set fp16" in message
    check_communication(CommunicationConfig(forward="fp16", backward="fp16"), plan, CPU)


def test_int8_is_refused_for_shards_that_are_no_whole_packs():
    tables = [table(f"t_{i}", 0, dim=16) for i in range(5)]
    message = refusal(hand_made(*tables), forward="int8")
    assert "packs 32 columns together, but the plan has shards of other widths of t_0, t_1, t_2 and 2 more" in message
    check_communication(CommunicationConfig(forward="int8"), hand_made(table("t_a", 0, dim=64)), CPU)


def torchrec_fails(ranks, sharding_type):
    """What our refusal is for: if TorchRec learns it, this says so."""
    with pytest.raises(AssertionError, match="Unexpected"):
        step(ranks, sharding_type, "int8", "int8")


@pytest.mark.parametrize("sharding_type", ["row_wise", "table_row_wise", "grid_shard"])
def test_torchrec_itself_fails_on_partial_sums_in_int8(four_ranks, sharding_type):
    four_ranks.run(torchrec_fails, sharding_type)
