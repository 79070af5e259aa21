"""One model, its tables sharded in every way at once: the whole training step, its optimizers, and its checkpoints."""

import contextlib
import io

import pytest
import torch
from torch import nn

from papilio.sharding.planner.errors import PlanError
from papilio.sharding.runtime.initial_weights import initial_weights, initialize_tables
from papilio.trainer.config_file import ConfigError, build_config
from papilio.trainer.optimizers import learning_rate_factor
from papilio.trainer.run.evaluate_run import evaluate_run
from papilio.trainer.train import train
from tests.support.checkpoints import load_model, newest, save_model, saved_tensors
from tests.support.clicks import (
    DIM,
    EVERY_TYPE,
    SCHEDULE,
    SLICES,
    SPARSE_KEY,
    TABLES,
    Clicks,
    make_samples,
    optimizer_config,
    shard_clicks,
    train_steps,
)
from tests.support.datasets import write_dataset
from tests.support.reference import SparseReference, pool_bags


def train_and_save(ranks, types, optimizer, folder):
    """Train the steps of SLICES, save the weights, and return their number."""
    model, optimizers = shard_clicks(ranks, types, optimizer_config(optimizer))
    train_steps(ranks, model, optimizers, range(4))
    save_model(ranks, model, optimizers, folder)
    return model.num_parameters


def load_whole(ranks, sharding_type, folder):
    """All weights of a checkpoint, on one rank."""
    model, _ = shard_clicks(ranks, dict.fromkeys(EVERY_TYPE, sharding_type), optimizer_config("sgd"))
    load_model(ranks, model, None, folder)
    state = model.module.state_dict()
    return {k: (w.local_shards()[0].tensor if hasattr(w, "local_shards") else w).clone() for k, w in state.items()}


def train_reference(optimizer, sizes_by_step):
    """Whole tables with the optimizers' formulas, on global batches."""
    config = optimizer_config(optimizer)
    linear = Clicks().linear
    weights, optimizers = {}, {}
    for name, (rows, _) in TABLES.items():
        weights[name] = initial_weights(SPARSE_KEY.format(name), 3, rows, DIM, torch.device("cpu"))
        is_halved = EVERY_TYPE[f"t_{name}"] in ("column_wise", "table_column_wise", "grid_shard")
        parts = weights[name].split(DIM // 2 if is_halved else DIM, dim=1)
        optimizers[name] = [(part, SparseReference(optimizer, None, config.sparse.eps, part)) for part in parts]
    for step, sizes in enumerate(sizes_by_step):
        factor = learning_rate_factor(SCHEDULE, step)
        dense, bags, labels = make_samples(step, sum(sizes))
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        pooled = [pool_bags(leaves[name], *bags[name], pooling) for name, (_, pooling) in TABLES.items()]
        logits = linear(torch.cat([dense, *pooled], dim=1)).squeeze(1)
        linear.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.sub_(config.dense.learning_rate * factor * parameter.grad)
        for name, parts in optimizers.items():
            for (part, reference), gradient in zip(
                parts, leaves[name].grad.split(parts[0][0].shape[1], 1), strict=True
            ):
                reference.learning_rate = config.sparse.learning_rate * factor
                reference.step(part, gradient)
    tables = {SPARSE_KEY.format(name): weight for name, weight in weights.items()}
    return tables | {f"model.linear.{name}": value for name, value in linear.state_dict().items()}


@pytest.mark.parametrize("pool", ["two_ranks", "four_ranks"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_every_sharding_type_trains_and_is_saved(request, one_rank, tmp_path, pool, optimizer):
    """Losses of uneven slices, learning rates by step, all tables by the sparse optimizer; read back on one rank."""
    pool = request.getfixturevalue(pool)
    counts = pool.run(train_and_save, EVERY_TYPE, optimizer, str(tmp_path))
    expected = train_reference(optimizer, SLICES[pool.world_size])
    assert set(counts) == {sum(weight.numel() for weight in expected.values())}
    for sharding_type in ("table_wise", "data_parallel"):
        found = one_rank.run(load_whole, sharding_type, str(tmp_path))[0]
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight.detach(), rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_a_checkpoint_of_replicas_loads_into_shards(four_ranks, one_rank, tmp_path):
    """And shards of every type are read back whole: the same weights, wherever they were."""
    replicated = dict.fromkeys(EVERY_TYPE, "data_parallel")
    one_rank.run(load_and_save, replicated, None, str(tmp_path / "replicated"))
    four_ranks.run(load_and_save, EVERY_TYPE, str(tmp_path / "replicated"), str(tmp_path / "sharded"))
    found = one_rank.run(load_whole, "table_wise", str(tmp_path / "sharded"))[0]
    for name, (rows, _) in TABLES.items():
        key = SPARSE_KEY.format(name)
        assert torch.equal(found[key], initial_weights(key, 99, rows, DIM, torch.device("cpu"))), name


def load_and_save(ranks, types, source, target):
    """Take weights from a checkpoint, or new ones, and save them."""
    model, optimizers = shard_clicks(ranks, types, optimizer_config("sgd"))
    if source is None:
        initialize_tables(model.module, seed=99)
    else:
        load_model(ranks, model, optimizers, source)
    save_model(ranks, model, optimizers, target)


def run_of(folder, **sections):
    """Config of a small run on the data set in `folder`."""
    optimizer = {"name": "rowwise_adagrad", "learning_rate": 0.1}
    tree = {
        "name": "small",
        "data": {"path": str(folder / "data"), "shuffle_block_rows": 8},
        "model": {"embedding_dim": DIM, "dense_arch_layer_sizes": [16], "over_arch_layer_sizes": [16]},
        "optimizer": {"sparse": optimizer, "dense": {"name": "sgd", "learning_rate": 0.1}},
        "train": {"global_batch_size": 20, "eval_batch_size": 64, "epochs": 4},
    }
    for name, changes in sections.items():
        tree[name] = {**tree.get(name, {}), **changes}
    return build_config(tree, source="test")


def train_and_evaluate(ranks, config):
    """Train and evaluate what was saved; return both reports of the test split, or the error."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            summary = train(config, ranks)
    except (ConfigError, PlanError) as error:
        return str(error)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluate_run(config, summary.run_dir, config.data.path, "test", ranks)
    return summary.final["test"], printed.getvalue()


def test_tables_of_half_precision_train_are_saved_and_evaluated(two_ranks, tmp_path):
    write_dataset(tmp_path / "data")
    found = {}
    for precision in ("fp32", "fp16"):
        output = {"run_dir": str(tmp_path / precision)}
        config = run_of(tmp_path, model={"embedding_dim": DIM, "table_precision": precision}, output=output)
        (metrics, printed), _ = two_ranks.run(train_and_evaluate, config)
        assert f"{metrics.auc:.4f}" in printed
        found[precision] = metrics
    saved = saved_tensors(newest(tmp_path / "fp16" / "checkpoints"))
    assert {str(values.dtype) for name, values in saved.items() if name.endswith(".weight")} == {"float16", "float32"}
    assert {str(saved[f"tables.t_{name}.weight"].dtype) for name in "abm"} == {"float16"}
    # Not the same run, but as good a one.
    assert found["fp16"].logloss != found["fp32"].logloss
    assert found["fp16"].logloss == pytest.approx(found["fp32"].logloss, rel=0.01)


def test_a_plan_that_would_change_the_training_is_refused_on_every_rank(two_ranks, tmp_path):
    write_dataset(tmp_path / "data")
    sharding = {"types": ["data_parallel"], "kernels": ["dense", "fused"]}
    config = run_of(tmp_path, model={"table_precision": "fp16"}, sharding=sharding, output={"run_dir": "unused"})
    for message in two_ranks.run(train_and_evaluate, config):
        assert message.startswith("sharding: table t_a may only be data_parallel, but model.table_precision is fp16")
