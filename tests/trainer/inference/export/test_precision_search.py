"""`--quantize auto` against every mix there is, on a model with three tables."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from papilio.data_pipeline.dataset import open_dataset
from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.inference.export import sensitivity
from papilio.trainer.inference.export.export_options import ExportOptions
from papilio.trainer.inference.export.exporter import export_package
from papilio.trainer.inference.export.held_out import BLOCK_ROWS, HeldOut
from papilio.trainer.inference.export.precision_search import choose
from papilio.trainer.inference.export.sensitivity import Sensitivity, sample_size
from papilio.trainer.inference.export.trained_model import open_trained_model
from papilio.trainer.inference.package.format import PRECISIONS, PackageError, row_bytes
from papilio.trainer.inference.package.quantizers import dequantize_rows, quantize_rows
from papilio.trainer.inference.package.table_writer import TableChoice
from papilio.trainer.inference.package.writer import write_model
from tests.support.scored_runs import probabilities_of, read_split, write_scored_run
from tests.support.trained_runs import make_config

ROWS = {"a": 30, "b": 11, "m": 17}
DIM = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_scored_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def reference(run, tmp_path_factory):
    checkpoints = CheckpointFolder(str(Path(run[1], "checkpoints")))
    model = open_trained_model(checkpoints, checkpoints.committed()[-1].name)
    fp32 = dict.fromkeys(model.tables, TableChoice("fp32"))
    folder = tmp_path_factory.mktemp("reference") / "package"
    return write_model(model, open_dataset(run[0]), fp32, str(folder), run=run[1], on_bytes=lambda num_bytes: None)


@pytest.fixture(scope="module")
def losses(run):
    """Expected increase of the log loss on validation by (feature, precision), in float64 by the formulas."""
    config, tensors = make_config(run[0]), run[2]
    shards = [shard for _, shard in read_split(run[0], "validation")]

    def probabilities(tables):
        return np.concatenate([probabilities_of(config, tensors, shard, tables) for shard in shards])

    fp32 = {name: tensors[f"tables.t_{name}.weight"] for name in ROWS}
    before = probabilities(fp32)
    found = {}
    for name, precision in itertools.product(ROWS, PRECISIONS):
        after = probabilities({**fp32, name: stored(fp32[name], precision)})
        divergence = before * np.log(before / after) + (1 - before) * np.log((1 - before) / (1 - after))
        found[name, precision] = float(divergence.mean())
    return found


def stored(values, precision):
    rows = quantize_rows(torch.from_numpy(np.array(values)), precision, "greedy")
    return dequantize_rows(rows, precision, values.shape[1]).numpy()


def bytes_of(mix):
    return sum(ROWS[name] * row_bytes(precision, DIM) for name, precision in zip(ROWS, mix, strict=True))


@pytest.mark.parametrize("budget", [0.19, 0.25, 0.33, 0.4, 0.5, 0.7, 1.0])
def test_the_choice_is_the_best_of_all_mixes(run, reference, losses, budget):
    found = choose(
        reference,
        HeldOut.for_search(open_dataset(run[0])),
        size_budget=budget,
        fixed={},
        quantizer="greedy",
    )
    fp32_bytes = sum(ROWS.values()) * DIM * 4
    fitting = [mix for mix in itertools.product(PRECISIONS, repeat=3) if bytes_of(mix) <= budget * fp32_bytes]

    def loss(mix):
        return sum(losses[name, precision] for name, precision in zip(ROWS, mix, strict=True))

    best = min(fitting, key=loss)
    chosen = tuple(found[f"t_{name}"].precision for name in ROWS)
    assert chosen in fitting
    assert loss(chosen) == pytest.approx(loss(best), rel=1e-3, abs=1e-9)
    assert {choice.quantizer for choice in found.values()} <= {"greedy", "minmax", "least_squares"}
    assert all(choice.used_quantizer == "greedy" for choice in found.values() if choice.precision in {"int4", "int2"})


def test_what_the_user_fixed_stays_and_counts(run, reference):
    fixed = {"t_a": TableChoice("fp32")}
    held_out = HeldOut.for_search(open_dataset(run[0]))
    found = choose(reference, held_out, size_budget=0.65, fixed=fixed, quantizer="minmax")
    assert found["t_a"] == TableChoice("fp32")
    assert bytes_of([choice.precision for choice in found.values()]) <= 0.65 * sum(ROWS.values()) * DIM * 4
    assert found["t_b"].precision != "fp32"


def test_a_budget_that_cannot_be_met_names_the_smallest(run, reference):
    held_out = HeldOut.for_search(open_dataset(run[0]))
    # Eight values of two bits, a scale and a bias: 6 of 32 bytes.
    message = r"--size-budget 0\.1: the tables take 1,856 bytes in fp32 and at least 348 .* smallest budget is 0\.1875"
    with pytest.raises(PackageError, match=message):
        choose(reference, held_out, size_budget=0.1, fixed={}, quantizer="minmax")
    with pytest.raises(
        PackageError, match=r"at least 1,128 in the smallest precisions with t_a as asked for; .* 0\.6078"
    ):
        choose(reference, held_out, size_budget=0.5, fixed={"t_a": TableChoice("fp32")}, quantizer="minmax")
    choose(reference, held_out, size_budget=0.1875, fixed={}, quantizer="minmax")


def test_export_meets_the_budget(run, tmp_path):
    options = ExportOptions(quantize="auto", size_budget=0.4, min_auc_ratio=0.9)
    package = export_package(run[1], str(tmp_path / "package"), options)
    tables = package.manifest.tables
    assert sum(table.num_bytes for table in tables) <= 0.4 * sum(table.fp32_bytes for table in tables)
    assert package.manifest.certified["auc_ratio"] >= 0.9


def test_a_mix_is_measured_as_the_sum_of_its_changes(run, reference, losses):
    """Losses of small changes add up, which the search counts on."""
    measured = Sensitivity(reference, HeldOut(open_dataset(run[0]), "validation"))
    mix = {f"t_{name}": TableChoice("int4", "greedy") for name in ROWS}
    together = measured.compare(mix).candidate.logloss - measured.compare({}).candidate.logloss
    assert together == pytest.approx(sum(losses[name, "int4"] for name in ROWS), abs=0.005)
    assert measured.compare({}).differences.max_absolute == 0
    assert measured.figures.model_dump() == {
        "data": run[0],
        "split": "validation",
        "num_samples": 900,
        "num_rows": 900,
    }


def test_the_sample_shrinks_where_models_are_large(reference, monkeypatch):
    assert sample_size(reference) == sensitivity.MAX_SAMPLES
    pooled_bytes = 2 * 3 * DIM * 4
    monkeypatch.setattr(sensitivity, "MAX_POOLED_BYTES", 3 * BLOCK_ROWS * pooled_bytes + 5)
    assert sample_size(reference) == 3 * BLOCK_ROWS
    # The file has a header, too.
    num_weights = 3 * 16 + 16 + 16 * 8 + 8 + 14 * 16 + 16 + 16 + 1
    monkeypatch.setattr(sensitivity, "MAX_SWEEP_FLOPS", 2.9 * BLOCK_ROWS * 2 * num_weights * 3 * 5)
    assert sample_size(reference) == 2 * BLOCK_ROWS
    monkeypatch.setattr(sensitivity, "MAX_SWEEP_FLOPS", 1)
    assert sample_size(reference) == BLOCK_ROWS
