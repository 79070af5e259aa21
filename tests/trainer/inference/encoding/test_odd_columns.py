"""From a table to a package where columns have odd names, or no ids at all: the package scores as the trained model."""

import csv
import random
from pathlib import Path

import pytest
import torch

from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.loading.loader import Loader
from papilio.data_pipeline.preprocess.engine import preprocess
from papilio.data_pipeline.preprocess.preprocess_options import PreprocessOptions
from papilio.trainer.config_file import build_config
from papilio.trainer.inference.backends.flat_model import build_flat_model
from papilio.trainer.inference.export.export_options import ExportOptions
from papilio.trainer.inference.export.exporter import export_package
from papilio.trainer.inference.export.held_out import HeldOut
from tests.support.checkpoints import load_model

# Of the tables, in the schema's order: distinct ids of the training split and the two reserved rows.
TABLES = {"t_user%2Eid": 4, "t_a/b c": 5, "t_training": 5, "t_missing": 2, "t_rare": 2, "t_empty bags": 2, "t_1²": 3}
SCHEMA = """
label = "click.ed"
dense = [{ name = "age.x" }]
[[categorical]]
name = "user.id"
[[categorical]]
name = "a/b c"
[[categorical]]
name = "training"
[[categorical]]
name = "missing"
kind = "integer"
[[categorical]]
name = "rare"
frequency_threshold = 2
[[categorical]]
name = "empty bags"
multi_hot = true
kind = "hex"
[[categorical]]
name = "1²"
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder, generator = tmp_path_factory.mktemp("data"), random.Random(0)
    with (folder / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["click.ed", "age.x", *(name.removeprefix("t_").replace("%2E", ".") for name in TABLES)])
        for row in range(200):
            user, page, other = (generator.choice(letters) for letters in ("uv", "xyz", "abc"))
            clicked = int(generator.random() < (0.8 if user == "u" else 0.2))
            writer.writerow([clicked, row % 9, user, page, other, "", f"r{row}", "", "é"])
    (folder / "schema.toml").write_text(SCHEMA, encoding="utf-8")
    words = {"split": "fraction", "fractions": (0.5, 0.25, 0.25), "num_workers": 1, "show_progress": False}
    paths = {"inputs": (f"{folder}/data.csv",), "schema_path": f"{folder}/schema.toml", "output": f"{folder}/set"}
    manifest = preprocess(PreprocessOptions(source="table", **paths, **words))
    stats = manifest.categorical_stats
    assert [column.num_embeddings for column in stats.values()] == list(TABLES.values())
    assert (stats["missing"].cardinality, stats["missing"].missing_rate) == (0, 1)
    assert (stats["rare"].cardinality, stats["rare"].unknown_rate) == (200, 1)
    assert (stats["empty bags"].mean_ids_per_sample, stats["empty bags"].missing_rate) == (0, 1)
    return str(folder / "set")


def make_config(data, run_dir):
    tree = {
        "name": "odd",
        "data": {"path": str(data)},
        "model": {"embedding_dim": 8, "dense_arch_layer_sizes": [8], "over_arch_layer_sizes": [8]},
        "train": {"global_batch_size": 20, "epochs": 2},
        "sharding": {"types": ["row_wise", "table_wise"]},
        "output": {"run_dir": str(run_dir), "tensorboard": False},
    }
    return build_config(tree, source="test")


def train_and_predict(ranks, data, run_dir):
    """Train, load what was saved, and return the probabilities of the test split."""
    from papilio.trainer.sharded_model import build_sharded_model
    from papilio.trainer.train import train

    config, dataset = make_config(data, run_dir), open_dataset(data)
    train(config, ranks)
    sharded = build_sharded_model(config, dataset, ranks)
    load_model(ranks, sharded, None, Path(run_dir, "checkpoints"))
    sharded.module.eval()
    words = {"global_batch_size": 50, "shuffle": False, "rank": ranks.rank, "world_size": ranks.world_size}
    with torch.no_grad():
        return [
            torch.sigmoid(sharded.module(batch)[1].logits) for batch in Loader(dataset, "test", config.data, **words)
        ]


def test_a_package_of_odd_columns_scores_as_the_model_that_was_trained(data, two_ranks, tmp_path):
    by_rank = two_ranks.run(train_and_predict, data, tmp_path / "run")
    expected = torch.cat([part for parts in zip(*by_rank, strict=True) for part in parts])
    package = export_package(
        str(tmp_path / "run"), str(tmp_path / "package"), ExportOptions(quantize="fp32", has_gate=False)
    )
    assert {table.name: table.rows for table in package.manifest.tables} == TABLES
    flat = build_flat_model(package)
    blocks = HeldOut.for_gate(open_dataset(data)).blocks()
    found = torch.cat([flat(block.dense, block.ids, block.lengths) for block in blocks])
    assert len(found) == 50
    assert found.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
