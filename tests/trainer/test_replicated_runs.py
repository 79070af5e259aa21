"""Whole small runs with replicated groups: what is averaged, saved, and evaluated again on other numbers of ranks."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from papilio.trainer.checkpoint.format import MARKER, CheckpointError
from papilio.trainer.config_file import ConfigError, build_config
from papilio.trainer.run.evaluate_run import evaluate_run
from papilio.trainer.run.folder import load_run_config
from papilio.trainer.train import train
from tests.support.checkpoints import load_model, newest, saved_tensors
from tests.support.datasets import write_dataset

BATCH = 20  # of 403 training samples: the last batch has 3, fewer than there are ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"))


def make_config(data, run_dir, *, optimizer="rowwise_adagrad", train=(), **replicas):
    tree = {
        "name": "small",
        "seed": 4,
        "data": {"path": data, "shuffle_block_rows": 8},
        "model": {"embedding_dim": 8, "dense_arch_layer_sizes": [16], "over_arch_layer_sizes": [16]},
        "optimizer": {
            "sparse": {"name": optimizer, "learning_rate": 0.1},
            "dense": {"name": "sgd", "learning_rate": 0.1},
        },
        "train": {"global_batch_size": BATCH, "eval_batch_size": 64, **dict(train)},
        "sharding": {"types": ["row_wise", "table_wise"], "replicas": replicas},
        "output": {"run_dir": str(run_dir), "tensorboard": False},
    }
    return build_config(tree, source="test")


def run_train(ranks, config):
    """Train; return the metrics of the test split."""
    with contextlib.redirect_stdout(io.StringIO()):
        return train(config, ranks).final["test"].to_dict()


def run_evaluate(ranks, run_dir, data):
    """What evaluation prints on this rank, or the error."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            evaluate_run(load_run_config(run_dir), run_dir, data, "test", ranks)
        except (ConfigError, CheckpointError) as error:
            return str(error)
    return out.getvalue()


def saved_tables(folder):
    """The tables' weights in a checkpoint, by key."""
    return {key: values for key, values in saved_tensors(folder).items() if key.startswith("tables.")}


def checkpoint_of(run_dir):
    """Folder of a run's newest checkpoint."""
    return newest(Path(run_dir, "checkpoints"))


def check_metrics_printed(output, metrics):
    """AUC, NE and logloss as the run measured them, to the digits shown."""
    line = next(line for line in output.splitlines() if line.split()[:1] == ["test"] and "|" not in line)
    for name in ("auc", "ne", "logloss"):
        assert f"{metrics[name]:.4f}" in line, (name, metrics, line)


def validation_at(run_dir, step):
    lines = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["kind"] == "validation" and line["step"] == step)


def test_sgd_averaged_after_every_step_trains_as_one_copy_does(four_ranks, one_rank, data, tmp_path):
    grouped = make_config(data, tmp_path / "grouped", optimizer="sgd", num_groups=2)
    alone = make_config(data, tmp_path / "alone", optimizer="sgd")
    found, expected = four_ranks.run(run_train, grouped)[0], one_rank.run(run_train, alone)[0]
    for name in ("auc", "logloss"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5)
    tables = saved_tables(checkpoint_of(tmp_path / "grouped"))
    for name, weight in saved_tables(checkpoint_of(tmp_path / "alone")).items():
        np.testing.assert_allclose(tables[name], weight, rtol=1e-4, atol=1e-5, err_msg=name)


def test_averaged_groups_save_one_copy_for_any_number_of_ranks(four_ranks, two_ranks, one_rank, data, tmp_path):
    run_dir = str(tmp_path / "run")
    metrics = four_ranks.run(run_train, make_config(data, run_dir, num_groups=2, sync_every_steps=4))[0]
    assert not list(checkpoint_of(run_dir).glob("group_*"))
    for pool in (one_rank, two_ranks, four_ranks):
        check_metrics_printed(pool.run(run_evaluate, run_dir, data)[0], metrics)


def test_groups_are_averaged_before_an_evaluation(four_ranks, data, tmp_path):
    """After 3 steps the longer run must measure what a run of 3 steps ends with, though no averaging is due."""
    never_due = {"num_groups": 4, "sync_every_steps": 1000}
    longer = make_config(data, tmp_path / "longer", train={"max_steps": 6, "evaluate_every_steps": 3}, **never_due)
    shorter = make_config(data, tmp_path / "shorter", train={"max_steps": 3}, **never_due)
    for config in (longer, shorter):
        four_ranks.run(run_train, config)
    found, expected = (validation_at(tmp_path / name, 3) for name in ("longer", "shorter"))
    assert {name: found[name] for name in ("auc", "logloss")} == {name: expected[name] for name in ("auc", "logloss")}
    saved = saved_tables(checkpoint_of(tmp_path / "shorter"))
    assert saved, "the averaged tables are in the checkpoint"


def test_independent_groups_save_and_evaluate_a_copy_each(four_ranks, two_ranks, data, tmp_path):
    run_dir = str(tmp_path / "run")
    metrics = four_ranks.run(run_train, make_config(data, run_dir, num_groups=2, independent_tables=True))[0]
    folders = [checkpoint_of(run_dir) / f"group_{group}" for group in (0, 1)]
    first, second = (saved_tables(folder) for folder in folders)
    assert first.keys() == second.keys() != set()
    assert all((first[name] != second[name]).any() for name in first)
    keys = [set(saved_tensors(folder)) for folder in folders]
    assert keys[0] == keys[1] > set(first), "the dense part is in both"
    for pool in (two_ranks, four_ranks):
        check_metrics_printed(pool.run(run_evaluate, run_dir, data)[0], metrics)


@pytest.fixture
def independent_run(four_ranks, data, tmp_path):
    run_dir = str(tmp_path / "run")
    four_ranks.run(run_train, make_config(data, run_dir, train={"max_steps": 1}, num_groups=2, independent_tables=True))
    return run_dir


def test_independent_tables_need_as_many_ranks_as_groups(independent_run, one_rank, three_ranks, data):
    for pool in (one_rank, three_ranks):
        message = pool.run(run_evaluate, independent_run, data)[0]
        assert f"cannot share {pool.world_size} rank(s) evenly; give --nproc 2 or a multiple of it" in message


def load_as_one_copy(ranks, run_dir):
    from papilio.data_pipeline.dataset import open_dataset
    from papilio.trainer.sharded_model import build_sharded_model

    config = load_run_config(run_dir)
    config = make_config(config.data.path, run_dir)
    with pytest.raises(CheckpointError) as caught:
        load_model(
            ranks, build_sharded_model(config, open_dataset(config.data.path), ranks), None, f"{run_dir}/checkpoints"
        )
    return str(caught.value)


def test_independent_tables_do_not_load_as_one_copy(independent_run, one_rank):
    message = one_rank.run(load_as_one_copy, independent_run)[0]
    assert "holds the independent tables of 2 groups, this job has 1; set sharding.replicas.num_groups = 2" in message


def test_a_copy_of_each_group_is_no_checkpoint_without_the_marker(independent_run, two_ranks, data):
    (checkpoint_of(independent_run) / MARKER).unlink()
    assert "holds no complete checkpoint" in two_ranks.run(run_evaluate, independent_run, data)[0]
