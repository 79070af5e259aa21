"""The models against NumPy statements of the papers' formulas, given the same weights."""

import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor

from papilio.trainer.models.dcn import DLRMDCNv2, PooledFeatures
from papilio.trainer.models.dlrm import DLRM, DotInteraction
from papilio.trainer.models.interaction import DenseAndDots, make_pairs
from papilio.trainer.models.mlp import make_mlp
from tests.support.reference import dcnv2_logits, dlrm_logits, pool_bags

FEATURES = ["u", "v", "w"]
ROWS = [11, 7, 5]
DIM = 8
BATCH = 6


def make_tables():
    return EmbeddingBagCollection(
        [
            EmbeddingBagConfig(name=f"t_{name}", feature_names=[name], num_embeddings=rows, embedding_dim=DIM)
            for name, rows in zip(FEATURES, ROWS, strict=True)
        ]
    )


def make_inputs():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 4, (len(FEATURES), BATCH), generator=generator)
    ids = [torch.randint(0, rows, (int(n.sum()),), generator=generator) for rows, n in zip(ROWS, lengths, strict=True)]
    dense = torch.randn(BATCH, 4, generator=generator)
    return dense, ids, lengths


def pooled_by_hand(model, ids, lengths):
    tables = model.embedding_bag_collection.embedding_bags
    pooled = [
        pool_bags(tables[f"t_{name}"].weight, i, n, "sum") for name, i, n in zip(FEATURES, ids, lengths, strict=True)
    ]
    return torch.stack(pooled, dim=1).detach().double().numpy()


def layers_of(mlp):
    linears = [layer for layer in mlp if isinstance(layer, torch.nn.Linear)]
    return [(layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()) for layer in linears]


def run(model, dense, ids, lengths):
    features = KeyedJaggedTensor(FEATURES, torch.cat(ids), lengths=lengths.flatten())
    return model(dense, features).detach().double().numpy()


def test_dlrm_is_the_papers_formula():
    torch.manual_seed(0)
    model = DLRM(make_tables(), FEATURES, 4, (6, 5), (9, 4), DIM)
    dense, ids, lengths = make_inputs()
    expected = dlrm_logits(
        dense.double().numpy(),
        pooled_by_hand(model, ids, lengths),
        layers_of(model.dense_arch),
        layers_of(model.over_arch),
    )
    np.testing.assert_allclose(run(model, dense, ids, lengths), expected, rtol=1e-6, atol=1e-6)


def test_dlrm_dcnv2_is_the_papers_formula():
    torch.manual_seed(0)
    model = DLRMDCNv2(make_tables(), FEATURES, 4, (6,), (9,), DIM, num_layers=2, low_rank_dim=3)
    for bias in model.crossnet.bias:
        torch.nn.init.normal_(bias)
    cross = [
        tuple(
            parameter.detach().double().numpy().reshape(shape) for parameter, shape in zip(kernels, shapes, strict=True)
        )
        for kernels in zip(model.crossnet.W_kernels, model.crossnet.V_kernels, model.crossnet.bias, strict=True)
        for shapes in [[(32, 3), (3, 32), (32,)]]
    ]
    dense, ids, lengths = make_inputs()
    expected = dcnv2_logits(
        dense.double().numpy(),
        pooled_by_hand(model, ids, lengths),
        layers_of(model.dense_arch),
        cross,
        layers_of(model.over_arch),
    )
    np.testing.assert_allclose(run(model, dense, ids, lengths), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 3, 1, 2]])
def test_dots_have_the_right_gradient(monkeypatch, order):
    # gradcheck needs doubles all the way, and on a CPU the products are taken in fp32.
    monkeypatch.setattr(torch, "float32", torch.float64)
    dense = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    pooled = torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True)
    pairs = make_pairs(order, torch.device("cpu"))
    assert torch.autograd.gradcheck(lambda d, p: DenseAndDots.apply(d, p, pairs), (dense, pooled))


def test_dlrm_does_not_depend_on_the_order_the_plan_leaves():
    torch.manual_seed(0)
    interaction = DotInteraction(FEATURES, DIM)
    dense, pooled = torch.randn(4, DIM), torch.randn(4, len(FEATURES), DIM)
    places = [2, 0, 1]
    shuffled = KeyedTensor([FEATURES[i] for i in places], [DIM] * 3, pooled[:, places].flatten(1))
    in_order = KeyedTensor(FEATURES, [DIM] * 3, pooled.flatten(1))
    torch.testing.assert_close(interaction(dense, shuffled), interaction(dense, in_order))


def test_bf16_autocast_stays_near_fp32():
    torch.manual_seed(0)
    model = DLRM(make_tables(), FEATURES, 4, (6, 5), (9, 4), DIM)
    inputs = make_inputs()
    exact = run(model, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        # bf16 has 8 bits: relative error 2^-9 a rounding, some ten roundings in a row.
        np.testing.assert_allclose(run(model, *inputs), exact, rtol=0.03, atol=0.02)


def test_pooled_features_follow_names_not_the_plans_order():
    values = torch.arange(24, dtype=torch.float32).view(1, 24)
    shuffled = KeyedTensor(keys=["w", "u", "v"], length_per_key=[DIM] * 3, values=values)
    found = PooledFeatures(FEATURES, DIM)(shuffled)
    assert found[0, :, 0].tolist() == [8.0, 16.0, 0.0]


@pytest.mark.parametrize(("fan_in", "fan_out"), [(400, 300)])
def test_initial_layers_have_the_reference_variance(fan_in, fan_out):
    torch.manual_seed(0)
    layer = make_mlp(fan_in, (), fan_out, last_relu=False)[0]
    # 120,000 draws: the sample variance is within 2 % at four standard errors.
    assert abs(layer.weight.var().item() / (2 / (fan_in + fan_out)) - 1) < 0.02
