"""Whole small runs on real ranks: equal to unsharded training, deterministic, honest about failure."""

import contextlib
import io
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.manifest import DatasetError
from papilio.sharding.runtime.initial_weights import initial_weights
from papilio.trainer.checkpoint.format import MARKER, CheckpointError
from papilio.trainer.config_file import ConfigError, build_config
from papilio.trainer.models.build import build_model
from papilio.trainer.run.evaluate_run import evaluate_run
from papilio.trainer.run.folder import load_run_config
from papilio.trainer.run.learning_alerts import TrainingError
from papilio.trainer.train import train
from tests.support.checkpoints import load_model, newest
from tests.support.datasets import ROWS_PER_TABLE, edit_manifest, write_dataset
from tests.support.reference import SparseReference, pool_bags

DIM = 8
SGD = {"name": "sgd", "learning_rate": 0.1}


def make_config(data, run_dir, /, **sections):
    tree = {
        "name": "small",
        "seed": 4,
        "data": {"path": str(data), "shuffle_block_rows": 8},
        "model": {"embedding_dim": DIM, "dense_arch_layer_sizes": [16], "over_arch_layer_sizes": [16]},
        "optimizer": {"sparse": {"name": "rowwise_adagrad", "learning_rate": 0.1}, "dense": SGD},
        "train": {"global_batch_size": 20, "log_every_steps": 5, "eval_batch_size": 64},
        "output": {"run_dir": str(run_dir)},
    }
    for name, changes in sections.items():
        tree[name] = {**tree.get(name, {}), **changes}
    return build_config(tree, source="test")


def run_train(ranks, config):
    """Train; return the final metrics and the kind of error, if any."""
    try:
        summary = train(config, ranks)
    except (ConfigError, DatasetError, TrainingError) as error:
        return str(error)
    return summary.final["validation"].to_dict()


def printed_by(ranks, function, *arguments):
    """What `function` prints on this rank."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function(ranks, *arguments)
    return out.getvalue()


def trained_weights(ranks, run_dir):
    """Whole tables and dense weights of a run, on one rank."""
    from papilio.trainer.sharded_model import build_sharded_model

    config = load_run_config(str(run_dir))
    model = build_sharded_model(config, open_dataset(config.data.path), ranks)
    load_model(ranks, model, None, run_dir / "checkpoints")
    whole = {}
    for name, weight in model.module.state_dict().items():
        tensor = weight.local_shards()[0].tensor if hasattr(weight, "local_shards") else weight
        whole[name.removeprefix("model.")] = tensor.clone()
    return whole


def samples_of(config, num_steps):
    """Each step's samples as one rank reads them; the set is the same for any number of ranks."""
    from papilio.data_pipeline.loading.loader import Loader

    loader = Loader(
        open_dataset(config.data.path),
        "train",
        config.data,
        global_batch_size=config.train.global_batch_size,
        seed=config.seed,
        num_epochs=config.train.epochs,
    )
    return [batch for _, batch in zip(range(num_steps), loader, strict=False)]


def interact(vector, pooled):
    """The dense vector and the dot products of all pairs, pair by pair."""
    vectors = [vector, *pooled]
    dots = [(vectors[i] * vectors[j]).sum(1) for i in range(len(vectors)) for j in range(i)]
    return torch.cat([vector, torch.stack(dots, dim=1)], dim=1)


def train_unsharded(config, num_steps):
    """Plain PyTorch: whole tables with the optimizers' formulas, the dense part by autograd and SGD."""
    dataset = open_dataset(config.data.path)
    model = build_model(config.model, dataset, torch.device("cpu"), config.seed)
    key = "embedding_bag_collection.embedding_bags.t_{}.weight"
    weights = {
        name: initial_weights("model." + key.format(name), config.seed, rows, DIM, torch.device("cpu"))
        for name, rows in ROWS_PER_TABLE.items()
    }
    sparse = config.optimizer.sparse
    optimizers = {n: SparseReference(sparse.name, sparse.learning_rate, sparse.eps, w) for n, w in weights.items()}
    dense_parameters = [p for name, p in model.named_parameters() if "embedding_bag_collection" not in name]
    dense_optimizer = torch.optim.SGD(dense_parameters, lr=config.optimizer.dense.learning_rate)
    for batch in samples_of(config, num_steps):
        leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
        features = batch.sparse_features.to_dict()
        pooled = [pool_bags(leaves[n], features[n].values(), features[n].lengths(), "sum") for n in ROWS_PER_TABLE]
        vector = model.dense_arch(batch.dense_features)
        if config.model.architecture == "dlrm":
            logits = model.over_arch(interact(vector, pooled)).squeeze(1)
        else:
            logits = model.over_arch(model.crossnet(torch.cat([vector, *pooled], dim=1))).squeeze(1)
        dense_optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels).backward()
        dense_optimizer.step()
        for name, optimizer in optimizers.items():
            optimizer.step(weights[name], leaves[name].grad)
    dense_weights = {k: v for k, v in model.state_dict().items() if "embedding_bag_collection" not in k}
    return {f"embedding_bag_collection.embedding_bags.t_{n}.weight": w for n, w in weights.items()} | dense_weights


@pytest.mark.parametrize(
    ("architecture", "sharding_type"),
    [
        ("dlrm", "table_wise"),
        ("dlrm", "row_wise"),
        ("dlrm", "data_parallel"),
        ("dlrm_dcnv2", "table_wise"),
        ("dlrm_dcnv2", "grid_shard"),
    ],
)
def test_two_ranks_train_what_an_unsharded_model_does(one_rank, two_ranks, tmp_path, architecture, sharding_type):
    """One epoch of 403 samples: 20 full steps and a short one of 3 samples, which the ranks share unevenly."""
    config = make_config(
        write_dataset(tmp_path / "data"),
        tmp_path / "run",
        sharding={"types": [sharding_type]},
        model={"architecture": architecture, "dcn_num_layers": 2, "dcn_low_rank_dim": 4},
    )
    two_ranks.run(run_train, config)
    found = one_rank.run(trained_weights, tmp_path / "run")[0]
    expected = train_unsharded(config, num_steps=21)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_evaluating_on_the_way_changes_nothing(one_rank, two_ranks, tmp_path):
    data = write_dataset(tmp_path / "data")
    often = {"global_batch_size": 20, "log_every_steps": 3, "evaluate_every_steps": 4, "epochs": 2}
    two_ranks.run(run_train, make_config(data, tmp_path / "plain", train={"epochs": 2}))
    two_ranks.run(run_train, make_config(data, tmp_path / "often", train=often))
    plain, evaluated = (one_rank.run(trained_weights, tmp_path / name)[0] for name in ("plain", "often"))
    for name, weight in plain.items():
        assert torch.equal(weight, evaluated[name]), name
    lines = [json.loads(line) for line in (tmp_path / "often" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [
        4,
        8,
        12,
        16,
        20,
        21,
        24,
        28,
        32,
        36,
        40,
        42,
    ]


def test_the_same_seed_gives_the_same_weights_bit_by_bit(one_rank, two_ranks, tmp_path):
    data = write_dataset(tmp_path / "data")
    for name in ("first", "second"):
        two_ranks.run(run_train, make_config(data, tmp_path / name, train={"precision": "bf16"}))
    first, second = (one_rank.run(trained_weights, tmp_path / name)[0] for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_learns_and_leaves_a_full_run_folder(two_ranks, tmp_path):
    data = write_dataset(tmp_path / "data", split_rows={"train": 4000, "validation": 2500, "test": 500})
    config = make_config(data, tmp_path / "run", train={"epochs": 2})
    first, second = two_ranks.run(run_train, config)
    assert first == second
    assert first["auc"] > 0.75
    assert first["ne"] < 0.9
    assert {path.name for path in Path(tmp_path / "run").iterdir()} == {
        "config.json",
        "versions.json",
        "data.json",
        "plan.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "job.json",
        "summary.json",
    }
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["num_samples"] == 8000
    assert summary["findings"] == []
    assert load_run_config(str(tmp_path / "run")) == config
    assert json.loads((tmp_path / "run" / "data.json").read_text())["splits"]["train"]["num_rows"] == 4000


def test_metrics_on_the_split_are_those_of_sklearn(one_rank, two_ranks, tmp_path):
    from sklearn.metrics import log_loss, roc_auc_score

    data = write_dataset(tmp_path / "data")
    config = make_config(data, tmp_path / "run")
    measured = two_ranks.run(run_train, config)[0]
    weights = one_rank.run(trained_weights, tmp_path / "run")[0]
    columns = [open_dataset(data).open_split("validation").shard(index) for index in (0, 1)]
    model = build_model(config.model, open_dataset(data), torch.device("cpu"), 0)
    model.load_state_dict({k: v for k, v in weights.items() if "embedding_bag" not in k}, strict=False)
    pooled = []
    for place, name in enumerate(ROWS_PER_TABLE):
        bags = [c.bags[place] for c in columns]
        ids = torch.from_numpy(np.concatenate([b.ids for b in bags]))
        lengths = np.concatenate([np.ones(len(b.ids), int) if b.offsets is None else np.diff(b.offsets) for b in bags])
        weight = weights[f"embedding_bag_collection.embedding_bags.t_{name}.weight"]
        pooled.append(pool_bags(weight, ids, torch.from_numpy(lengths), "sum"))
    dense = torch.from_numpy(np.concatenate([c.dense for c in columns]))
    vector = model.dense_arch(dense)
    logits = model.over_arch(interact(vector, pooled)).squeeze(1)
    scores, labels = torch.sigmoid(logits).detach().double().numpy(), np.concatenate([c.labels for c in columns])
    assert measured["num_samples"] == 90
    assert measured["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert measured["logloss"] == pytest.approx(log_loss(labels, scores), rel=1e-5)


def test_a_run_that_does_not_learn_says_so_loudly(two_ranks, tmp_path):
    rows = {"train": 400, "validation": 4000, "test": 100}
    data = write_dataset(tmp_path / "data", labels="random", split_rows=rows)
    first, second = two_ranks.run(printed_by, run_train, make_config(data, tmp_path / "run"))
    findings = json.loads((tmp_path / "run" / "summary.json").read_text())["findings"]
    assert any("no better than chance" in finding for finding in findings)
    assert "WARNING: NOT LEARNING: AUC on validation is" in first
    assert second == "", "only the first rank prints"


def test_nan_stops_the_run_and_names_the_batch(two_ranks, tmp_path):
    data = write_dataset(tmp_path / "data", dense_scale=1e30)
    messages = two_ranks.run(run_train, make_config(data, tmp_path / "run"))
    assert messages[0] == messages[1]
    assert "is NaN or infinite (steps count from 0; its batch: the 20 samples before sample" in messages[0]


def test_mistakes_are_told_before_training(two_ranks, tmp_path):
    data = write_dataset(tmp_path / "data")
    cases = {
        "model.table_rows.a = 5, but the data set has 30 ids": {"model": {"table_rows": {"a": 5}}},
        "model.table_rows.aa: the data set has no such feature; did you mean a?": {"model": {"table_rows": {"aa": 99}}},
        "model.dense_in_features = 5, but data set": {"model": {"dense_in_features": 5}},
        "optimizer.sparse.name = 'adam': FBGEMM has no CPU kernel": {"optimizer": {"sparse": {"name": "adam"}}},
        "is not a complete data set": {"data": {"path": str(tmp_path / "nowhere")}},
    }
    for message, sections in cases.items():
        found = two_ranks.run(run_train, make_config(data, tmp_path / "run", **sections))
        assert message in found[0]
        assert found[0] == found[1]
    with open(Path(data) / "train" / "0.arrow", "r+b") as shard:
        shard.seek(-200, 2)
        shard.write(b"xx")
    found = two_ranks.run(run_train, make_config(data, tmp_path / "run"))
    assert "train/0.arrow was changed after it was written" in found[0]
    assert not (tmp_path / "run").exists(), "nothing is written before the checks"


def evaluate_or_fail(ranks, run_dir, data_dir, split, checkpoint="latest"):
    try:
        evaluate_run(load_run_config(str(run_dir)), str(run_dir), str(data_dir), split, ranks, checkpoint)
    except (ConfigError, DatasetError, CheckpointError) as error:
        return str(error)
    return None


def test_evaluation_repeats_the_runs_figures_on_another_world_size(one_rank, two_ranks, tmp_path):
    data = write_dataset(tmp_path / "data")
    measured = two_ranks.run(run_train, make_config(data, tmp_path / "run"))[0]
    printed = one_rank.run(printed_by, evaluate_or_fail, tmp_path / "run", data, "validation")[0]
    line = next(line for line in printed.splitlines() if "calibration" not in line and "0." in line)
    assert f"{measured['auc']:.4f}" in line
    assert f"{measured['logloss']:.4f}" in line


def test_any_checkpoint_can_be_evaluated(one_rank, tmp_path):
    """Each gives what was measured when it was saved."""
    data = write_dataset(tmp_path / "data")
    checkpoint = {"every_steps": 7, "every_minutes": None, "keep_last": 9}
    train_section = {"evaluate_every_steps": 7, "max_steps": 21}
    one_rank.run(run_train, make_config(data, tmp_path / "run", checkpoint=checkpoint, train=train_section))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    aucs = {line["step"]: line["auc"] for line in lines if line["kind"] == "validation"}
    assert list(aucs) == [7, 14, 21]
    best = max(aucs, key=aucs.get)
    for word, step in (("7", 7), ("14", 14), ("latest", 21), ("best", best)):
        printed = one_rank.run(printed_by, evaluate_or_fail, tmp_path / "run", data, "validation", word)[0]
        assert f"checkpoint step_{step:010}-" in printed
        assert f" {aucs[step]:.4f} " in printed
    message = one_rank.run(evaluate_or_fail, tmp_path / "run", data, "validation", "8")[0]
    assert "there is no checkpoint 8 in" in message


def test_evaluation_refuses_what_it_cannot_read(one_rank, tmp_path):
    data = write_dataset(tmp_path / "data")
    other = write_dataset(tmp_path / "other")
    one_rank.run(run_train, make_config(data, tmp_path / "run"))
    edit_manifest(other, '"num_embeddings": 30', '"num_embeddings": 31')
    assert "differs from the one" in one_rank.run(evaluate_or_fail, tmp_path / "run", other, "test")[0]
    assert "no rows in split 'tset'" in one_rank.run(evaluate_or_fail, tmp_path / "run", data, "tset")[0]
    assert "is not a run folder" in one_rank.run(load_error, tmp_path)[0]
    marker = newest(tmp_path / "run" / "checkpoints") / MARKER
    content = json.dumps({"format_version": 99})
    marker.write_text(f'{{"crc32": {zlib.crc32(content.encode())}, "checkpoint": {content}}}')
    assert "has format version 99" in one_rank.run(evaluate_or_fail, tmp_path / "run", data, "test")[0]
    marker.unlink()
    assert "holds no complete checkpoint" in one_rank.run(evaluate_or_fail, tmp_path / "run", data, "test")[0]


def load_error(ranks, folder):
    with pytest.raises(ConfigError) as error:
        load_run_config(str(folder))
    return str(error.value)


def test_a_run_of_another_version_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"format_version": 7}')
    with pytest.raises(ConfigError, match="has format version 7; this Papilio reads 1"):
        load_run_config(str(tmp_path))


def test_math_is_not_nan_in_reports(two_ranks, tmp_path):
    """A validation split of one label has no AUC; the run goes on and its JSON stays readable."""
    data = write_dataset(tmp_path / "data", split_rows={"train": 100, "validation": 1, "test": 3})
    found = two_ranks.run(run_train, make_config(data, tmp_path / "run"))[0]
    assert math.isnan(found["auc"])
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
