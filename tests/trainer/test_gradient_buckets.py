"""Resuming on many ranks, where sums of gradients depend on how they are cut into buckets."""

import contextlib
import io

import numpy as np
import pytest
import torch

from papilio.data_pipeline.dataset import open_dataset
from papilio.trainer.config_file import build_config
from papilio.trainer.optimizers import Optimizers
from papilio.trainer.sharded_model import build_sharded_model, fix_gradient_buckets
from papilio.trainer.train import train
from tests.support.checkpoints import newest, saved_tensors
from tests.support.datasets import write_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"))


def make_config(data, run_dir, max_steps=None):
    tree = {
        "name": "small",
        "seed": 4,
        "data": {"path": data, "shuffle_block_rows": 8},
        "model": {"embedding_dim": 8, "dense_arch_layer_sizes": [32, 16], "over_arch_layer_sizes": [32]},
        "optimizer": {"sparse": {"name": "rowwise_adagrad", "learning_rate": 0.1}, "dense": {"name": "adam"}},
        "train": {"global_batch_size": 20, "eval_batch_size": 64, "max_steps": max_steps},
        "sharding": {"types": ["table_wise", "row_wise"]},
        "output": {"run_dir": str(run_dir), "tensorboard": False},
    }
    return build_config(tree, source="test")


def run(ranks, config):
    with contextlib.redirect_stdout(io.StringIO()):
        train(config, ranks)


def test_four_ranks_that_go_on_end_bit_equal(four_ranks, data, tmp_path):
    for steps in (4, 9, None):
        four_ranks.run(run, make_config(data, tmp_path / "stopped", steps))
    four_ranks.run(run, make_config(data, tmp_path / "whole"))
    stopped, whole = (saved_tensors(newest(tmp_path / name / "checkpoints")) for name in ("stopped", "whole"))
    assert stopped.keys() == whole.keys()
    assert [key for key in whole if not np.array_equal(stopped[key], whole[key])] == []


def tensors_before_and_after(ranks, config):
    """All weights and optimizer state of this rank, before and after the passes, and the next one's sums of buckets."""
    from papilio.trainer.checkpoint.model_state import model_state

    dataset = open_dataset(config.data.path)
    model = build_sharded_model(config, dataset, ranks)
    optimizers = Optimizers(model.module, config.optimizer, config.schedule)

    def pieces():
        state = model_state(model.module, optimizers).snapshot()
        return {key: [piece.values for piece in tensor.pieces] for key, tensor in state.tensors.items()}

    before = pieces()
    fix_gradient_buckets(model, optimizers, dataset, ranks)
    return before, pieces(), [parameter.grad for parameter in model.module.parameters()]


def test_fixing_the_buckets_changes_nothing(two_ranks, data, tmp_path):
    for before, after, gradients in two_ranks.run(tensors_before_and_after, make_config(data, tmp_path)):
        assert before.keys() == after.keys()
        for key, values in before.items():
            assert all(torch.equal(one, other) for one, other in zip(values, after[key], strict=True)), key
        assert all(gradient is None or not gradient.any() for gradient in gradients)
