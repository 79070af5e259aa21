"""Packages of models that were trained: they predict as the sharded model does, whatever plan and ranks saved it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.loading.loader import Loader
from papilio.trainer.checkpoint.format import MARKER, Marker
from papilio.trainer.config_file import build_config
from papilio.trainer.inference.backends.flat_model import build_flat_model
from papilio.trainer.inference.export.export_options import ExportOptions
from papilio.trainer.inference.export.exporter import export_package
from papilio.trainer.inference.export.held_out import HeldOut
from tests.support.checkpoints import load_model, newest, save_model, saved_tensors
from tests.support.datasets import write_dataset

ARCHITECTURES = {
    "dlrm": {},
    "dlrm_dcnv2": {"architecture": "dlrm_dcnv2", "dcn_num_layers": 2, "dcn_low_rank_dim": 4, "pooling": "mean"},
}
PLANS = [
    ("one_rank", "table_wise"),
    ("two_ranks", "row_wise"),
    ("four_ranks", "column_wise"),
    ("four_ranks", "grid_shard"),
]


def make_config(data, run_dir, model, sharding_type):
    tree = {
        "name": "small",
        "data": {"path": str(data)},
        "model": {"embedding_dim": 8, "dense_arch_layer_sizes": [16], "over_arch_layer_sizes": [16], **model},
        "optimizer": {"sparse": {"learning_rate": 0.1}, "dense": {"name": "adam"}},
        "train": {"global_batch_size": 20, "epochs": 4},
        "sharding": {"types": [sharding_type], "min_partition": 4},
        "checkpoint": {"every_steps": None, "every_minutes": None},
        "output": {"run_dir": str(run_dir), "tensorboard": False},
    }
    return build_config(tree, source="test")


def train_run(ranks, data, run_dir, model):
    from papilio.trainer.train import train

    train(make_config(data, run_dir, model, "table_wise"), ranks)


def save_under_plan(ranks, data, run_dir, folder, model, sharding_type):
    """Load a checkpoint under a plan, save it again, and return the types of sharding of the plan."""
    from papilio.trainer.optimizers import Optimizers
    from papilio.trainer.sharded_model import build_sharded_model

    config = make_config(data, run_dir, model, sharding_type)
    sharded = build_sharded_model(config, open_dataset(data), ranks)
    optimizers = Optimizers(sharded.module, config.optimizer, config.schedule)
    load_model(ranks, sharded, optimizers, Path(run_dir, "checkpoints"))
    save_model(ranks, sharded, optimizers, folder, step=7)
    return {table.sharding_type for table in sharded.plan.tables}


def predict(ranks, data, run_dir, model):
    """Probabilities of the test split by the model that is trained and sharded."""
    from papilio.trainer.sharded_model import build_sharded_model

    config = make_config(data, run_dir, model, "row_wise")
    dataset = open_dataset(data)
    sharded = build_sharded_model(config, dataset, ranks)
    load_model(ranks, sharded, None, Path(run_dir, "checkpoints"))
    sharded.module.eval()
    loader = Loader(
        dataset, "test", config.data, global_batch_size=250, shuffle=False, rank=ranks.rank, world_size=ranks.world_size
    )
    with torch.no_grad():
        return [torch.sigmoid(sharded.module(batch)[1].logits) for batch in loader]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), split_rows={"train": 1203, "validation": 90, "test": 900})


@pytest.fixture(scope="module", params=ARCHITECTURES)
def run(request, tmp_path_factory, two_ranks, data):
    """A run that was trained on two ranks, and what its config says of the model."""
    folder, model = tmp_path_factory.mktemp("run"), ARCHITECTURES[request.param]
    two_ranks.run(train_run, data, folder, model)
    return str(folder), model


def test_fp32_predicts_as_the_sharded_model(run, data, two_ranks, tmp_path):
    folder, model = run
    by_rank = two_ranks.run(predict, data, folder, model)
    expected = torch.cat([part for parts in zip(*by_rank, strict=True) for part in parts])
    package = export_package(folder, str(tmp_path / "package"), ExportOptions(quantize="fp32"))
    flat = build_flat_model(package)
    found = torch.cat(
        [flat(block.dense, block.ids, block.lengths) for block in HeldOut.for_gate(open_dataset(data)).blocks()]
    )
    assert len(found) == 900
    assert found.std() > 0.1
    # Matrix products of other batch sizes round differently in their last bits.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_int8_keeps_the_quality(run, tmp_path):
    certified = export_package(run[0], str(tmp_path / "int8"), ExportOptions(min_auc_ratio=0.99)).manifest.certified
    assert certified["fp32_auc"] > 0.65
    assert certified["auc"] == pytest.approx(certified["fp32_auc"], abs=0.005)


def describe_as_of_a_run(path, source):
    """Give a checkpoint that was saved without a run the config and the data of one."""
    marker, of_run = (Marker.from_json(Path(folder, MARKER).read_text(), "") for folder in (path, source))
    described = Marker(**{**marker.__dict__, "config": of_run.config, "data": of_run.data})
    Path(path, MARKER).write_text(described.to_json())


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_any_plan_on_any_number_of_ranks_gives_the_same_bytes(request, run, data, tmp_path, precision):
    folder, model = run
    source = newest(Path(folder, "checkpoints"))
    options = ExportOptions(quantize=precision, has_gate=False)
    expected = export_package(folder, str(tmp_path / "of the run"), options)
    for pool, sharding_type in PLANS:
        name = f"{sharding_type} on {pool}"
        ranks = request.getfixturevalue(pool)
        types = ranks.run(save_under_plan, data, folder, tmp_path / name, model, sharding_type)[0]
        assert types == {sharding_type}
        describe_as_of_a_run(newest(tmp_path / name), source)
        found = export_package(str(tmp_path / name), str(tmp_path / f"{name}.package"), options)
        assert found.manifest.tables == expected.manifest.tables, name
        for file in ("tables.bin", "dense.safetensors", "config.json", "schema.json", "sample.json"):
            assert Path(found.path(file)).read_bytes() == Path(expected.path(file)).read_bytes(), (name, file)


def test_the_dense_part_is_the_checkpoint_s(run, tmp_path):
    from safetensors.numpy import load_file

    package = export_package(run[0], str(tmp_path / "package"), ExportOptions(has_gate=False))
    saved = saved_tensors(newest(Path(run[0], "checkpoints")))
    found = load_file(package.path("dense.safetensors"))
    expected = {key.removeprefix("dense.model."): values for key, values in saved.items() if key.startswith("dense.")}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    assert json.loads(Path(package.path("config.json")).read_text())["name"] == "small"
