"""From a run to a package: what is written, what is refused, and that nothing else is left behind."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.manifest import DatasetError
from papilio.trainer.checkpoint.format import CheckpointError, DamagedError
from papilio.trainer.config_file import ConfigError
from papilio.trainer.inference.export import exporter as exporting
from papilio.trainer.inference.export import gate
from papilio.trainer.inference.export.export_options import ExportOptions
from papilio.trainer.inference.export.exporter import export_package
from papilio.trainer.inference.package.format import MANIFEST, PackageError, read_package, verify_package
from papilio.trainer.storage import locked_folder
from tests.support.checkpoints import NAME, write_checkpoint
from tests.support.datasets import write_dataset
from tests.support.package_bytes import read_tables
from tests.support.trained_runs import expected_probabilities, make_config, random_weights, write_run

REPOSITORY = Path(__file__).resolve().parents[4]
FILES = {"tables.bin", "dense.safetensors", "config.json", "schema.json", "sample.json"}
UNCERTIFIED = ExportOptions(has_gate=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A run folder and its checkpoint's tensors."""
    return write_run(tmp_path_factory.mktemp("run"), data)


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_package_holds_the_checkpoint_s_values_and_says_where_they_came_from(tmp_path, data, trained):
    run, tensors = trained
    package = export_package(run, str(tmp_path / "new" / "package"), UNCERTIFIED)
    manifest = package.manifest
    assert names_in(tmp_path / "new") == ["package"]
    assert set(manifest.files) == FILES
    assert set(names_in(package.folder)) == FILES | {MANIFEST}
    assert dict(verify_package(package.folder)) == dict.fromkeys([MANIFEST, *manifest.files])
    assert (manifest.name, manifest.architecture, manifest.dense_features) == ("small", "dlrm", ("x0", "x1", "x2"))
    assert manifest.source.model_dump() == {"run": run, "checkpoint": NAME.format(7), "step": 7, "data": data}
    assert manifest.certified is None
    assert [(table.name, table.rows, table.precision) for table in manifest.tables] == [
        ("t_a", 30, "int8"),
        ("t_b", 11, "int8"),
        ("t_m", 17, "int8"),
    ]
    for table in manifest.tables:
        trained_rows, stored = tensors[f"tables.{table.name}.weight"], read_tables(package.folder)[table.name]
        difference = stored - trained_rows
        relative = np.linalg.norm(difference, axis=1) / np.linalg.norm(trained_rows, axis=1)
        error = table.row_error
        found = [error.mean_relative, error.max_relative, error.rms, error.max_absolute]
        expected = [relative.mean(), relative.max(), np.sqrt((difference**2).mean()), np.abs(difference).max()]
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        assert error.mean_relative < 0.01
        assert error.num_coarse_rows == 0


def test_the_sample_is_answered_as_the_formulas_say(tmp_path, data, trained):
    package = export_package(trained[0], str(tmp_path / "package"), UNCERTIFIED)
    sample = json.loads(Path(package.path("sample.json")).read_text())
    tables = {name[2:]: values for name, values in read_tables(package.folder).items()}
    encoded = [np.array(sample["encoded"][name]) for name in ("dense", "ids", "lengths")]
    expected = expected_probabilities(make_config(data), tables, trained[1], *encoded)
    np.testing.assert_allclose(sample["probabilities"], expected, rtol=0, atol=1e-6)
    # The first rows of the test split, which begins with a shard of 20.
    rows = open_dataset(data).open_split("test").shard(0)
    np.testing.assert_allclose(encoded[0], rows.dense[:4], rtol=1e-5)
    bags = [[record["a"], record["b"], *record["m"]] for record in sample["request"]["records"]]
    bounds = rows.bags[2].offsets[:5]
    for i, bag in enumerate(bags):
        ids = [*(rows.bags[b].ids[i] for b in (0, 1)), *rows.bags[2].ids[bounds[i] : bounds[i + 1]].tolist()]
        # Raw ids lie two below their rows; row 1 is a missing value (in a bag, none), row 0 any, here the first.
        raw = [None if row == 1 else max(row - 2, 0) for place, row in enumerate(ids) if place < 2 or row != 1]
        assert bag == raw


def test_precisions_by_table(tmp_path, trained):
    options = ExportOptions(
        quantize="int4", tables=(("t_*", "fp16"), ("t_a", "int2")), quantizer="greedy", has_gate=False
    )
    package = export_package(trained[0], str(tmp_path / "package"), options)
    assert [(table.precision, table.quantizer) for table in package.manifest.tables] == [
        ("int2", "greedy"),
        ("fp16", None),
        ("fp16", None),
    ]


def test_tables_of_fp16_and_of_more_rows_than_ids(tmp_path, data):
    run, tensors = write_run(tmp_path / "run", data, dtype=np.float16, table_rows={"a": 50}, table_precision="fp16")
    package = export_package(run, str(tmp_path / "package"), ExportOptions(quantize="fp16", has_gate=False))
    for name, values in read_tables(package.folder).items():
        np.testing.assert_array_equal(values, tensors[f"tables.{name}.weight"].astype(np.float32))
    assert package.manifest.tables[0].rows == 50


def test_a_certified_package_has_a_report(tmp_path, trained):
    package = export_package(trained[0], str(tmp_path / "package"), ExportOptions(min_auc_ratio=0.9))
    assert set(package.manifest.files) == FILES | {"report.json", "report.html"}
    assert package.manifest.certified["auc_ratio"] == pytest.approx(1, abs=0.05)
    assert names_in(tmp_path) == ["package"]


def test_fp32_is_compared_with_itself(tmp_path, trained):
    package = export_package(trained[0], str(tmp_path / "package"), ExportOptions(quantize="fp32", min_auc_ratio=1.0))
    assert package.manifest.certified["auc_ratio"] == 1
    assert package.manifest.certified["ne_ratio"] == 1


def test_auto_meets_the_budget_and_keeps_what_the_user_chose(tmp_path, trained):
    options = ExportOptions(quantize="auto", size_budget=0.3, tables=(("t_b", "fp16"),), min_auc_ratio=0.5)
    tables = export_package(trained[0], str(tmp_path / "package"), options).manifest.tables
    assert sum(table.num_bytes for table in tables) <= 0.3 * sum(table.fp32_bytes for table in tables)
    assert tables[1].precision == "fp16"


def test_a_package_that_the_gate_refuses_is_not_written(tmp_path, trained, monkeypatch):
    def refuse(*arguments, **options):
        raise gate.GateError("too bad")

    monkeypatch.setattr(gate, "check", refuse)
    with pytest.raises(gate.GateError, match="too bad"):
        export_package(trained[0], str(tmp_path / "package"), ExportOptions())
    assert names_in(tmp_path) == []


def test_an_empty_folder_may_become_the_package(tmp_path, trained):
    (tmp_path / "package").mkdir()
    export_package(trained[0], str(tmp_path / "package"), UNCERTIFIED)
    assert read_package(str(tmp_path / "package")).manifest.name == "small"


def test_relative_paths(tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_package(trained[0], "package", UNCERTIFIED)
    assert names_in(tmp_path) == ["package"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            "s3://bucket/package",
            "--output s3://bucket/package: a package is mapped into memory, so it is made on a local",
        ),
        ("file", "file is a file; give the name of a new folder"),
        ("used", "used is not empty; choose another folder, or remove it"),
        ("package", "package is a package already; choose another folder, or remove it"),
    ],
)
def test_outputs_that_are_in_use_are_refused(tmp_path, monkeypatch, output, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    for folder, name in (("used", "notes"), ("package", MANIFEST)):
        Path(folder).mkdir()
        Path(folder, name).write_text("mine")
    before = names_in(tmp_path)
    with pytest.raises(PackageError) as error:
        export_package("no run is looked for", output, UNCERTIFIED)
    assert message in str(error.value)
    assert names_in(tmp_path) == before


def refused(tmp_path, run, kind, message, options=UNCERTIFIED):
    with pytest.raises(kind) as error:
        export_package(str(run), str(tmp_path / "package"), options)
    assert message in str(error.value)
    assert not [name for name in names_in(tmp_path) if name.startswith("package")]


def test_runs_and_checkpoints_that_are_not_there_are_refused(tmp_path, trained):
    run = trained[0]
    refused(tmp_path, tmp_path / "x", CheckpointError, "x does not exist; give the folder that `papilio train` printed")
    named = ExportOptions(checkpoint="3", has_gate=False)
    refused(tmp_path, run, CheckpointError, "there is no checkpoint 3 in", named)


def test_patterns_that_fit_no_table_are_refused(tmp_path, trained):
    options = ExportOptions(tables=(("t_aa", "fp16"),), has_gate=False)
    refused(tmp_path, trained[0], PackageError, "--table t_aa=fp16: no table has such a name; there are t_a", options)


def test_data_that_is_not_there_is_asked_for(tmp_path, data):
    run, _ = write_run(tmp_path / "run", data)
    path = Path(run, "checkpoints", NAME.format(7), "checkpoint.json")
    identity = json.loads(path.read_text())["checkpoint"]["data"]
    write_checkpoint(
        tmp_path / "moved" / "checkpoints",
        random_weights(open_dataset(data), make_config(data)),
        config=make_config(data).model_dump(mode="json"),
        data=identity | {"path": "/nowhere/data"},
    )
    message = "the run was trained on data set /nowhere/data, which is not there; its vocabularies and held-out samples"
    refused(tmp_path, tmp_path / "moved", PackageError, message)
    export_package(str(tmp_path / "moved"), str(tmp_path / "package"), ExportOptions(data=data, has_gate=False))


def test_data_of_other_columns_is_refused(tmp_path, trained, data):
    from papilio.data_pipeline.generate.generate_options import GenerateOptions
    from papilio.data_pipeline.generate.generator import generate

    generate(GenerateOptions(shape="criteo_small", num_rows=500, output=str(tmp_path / "other")))
    options = ExportOptions(data=str(tmp_path / "other"), has_gate=False)
    refused(tmp_path, trained[0], ConfigError, "was trained on in: num_embeddings, schema", options)
    refused(tmp_path, trained[0], DatasetError, "is not a complete data set", ExportOptions(data=str(tmp_path)))


def test_data_with_nothing_held_out_is_refused_where_there_is_a_gate(tmp_path):
    data = write_dataset(tmp_path / "data", split_rows={"train": 50})
    run, _ = write_run(tmp_path / "run", data)
    refused(tmp_path, run, DatasetError, "held out", ExportOptions())
    package = export_package(run, str(tmp_path / "package"), UNCERTIFIED)
    assert len(json.loads(Path(package.path("sample.json")).read_text())["probabilities"]) == 4


def test_independent_tables_are_refused(tmp_path, data):
    config, dataset = make_config(data), open_dataset(data)
    copies = [random_weights(dataset, config, seed) for seed in (0, 1)]
    write_checkpoint(tmp_path / "run" / "checkpoints", copies, 2, config=config.model_dump(mode="json"), data={})
    message = "holds 2 models whose tables differ (sharding.replicas.independent_tables = true): a package is one model"
    refused(tmp_path, tmp_path / "run", PackageError, message)


def test_values_that_a_precision_cannot_hold_are_refused_by_table(tmp_path, data):
    tensors = random_weights(open_dataset(data), make_config(data))
    tensors["tables.t_b.weight"][3, 2] = -1e6
    run, _ = write_run(tmp_path / "large", data, tensors)
    for precision, what in (("int8", "the scale or bias of a row"), ("fp16", "its values")):
        message = f"table t_b holds values that {precision} cannot: {what} would be beyond fp16's largest, 65,504; use "
        options = ExportOptions(quantize=precision, has_gate=False)
        refused(tmp_path, run, PackageError, f"{message}--table t_b=fp32", options)
    fixed = ExportOptions(tables=(("t_b", "fp32"),), has_gate=False)
    assert read_tables(export_package(run, str(tmp_path / "fixed"), fixed).folder)["t_b"][3, 2] == -1e6


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4", "int2"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tables_that_are_not_finite_are_refused(tmp_path, data, precision, value):
    tensors = random_weights(open_dataset(data), make_config(data))
    tensors["tables.t_m.weight"][16, 7] = value
    run, _ = write_run(tmp_path / "run", data, tensors)
    options = ExportOptions(quantize=precision, has_gate=False)
    refused(
        tmp_path, run, PackageError, "table t_m holds NaN or infinity, so the model gives no probabilities", options
    )


def test_a_damaged_checkpoint_is_refused(tmp_path, data):
    run, _ = write_run(tmp_path / "run", data)
    part = Path(run, "checkpoints", NAME.format(7), "r.bin")
    raw = bytearray(part.read_bytes())
    raw[100] ^= 1
    part.write_bytes(raw)
    refused(tmp_path, run, DamagedError, "r.bin")


def test_a_table_that_the_checkpoint_lacks_is_named(tmp_path, data):
    tensors = random_weights(open_dataset(data), make_config(data))
    del tensors["tables.t_m.weight"]
    run, _ = write_run(tmp_path / "run", data, tensors)
    refused(tmp_path, run, PackageError, "has no table t_m, though the data has feature m")


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(exporting, "free_local_bytes", lambda folder: 1000)
    refused(tmp_path, trained[0], PackageError, "/package has 1,000 free; choose an --output on another disk")
    refused(tmp_path, trained[0], PackageError, "1,856 of them for the fp32 model that it is compared", ExportOptions())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("step", ["write_model", "add_encoding", "gate.check", "write_manifest", "os.replace"])
def test_whatever_goes_wrong_leaves_nothing_behind(tmp_path, trained, monkeypatch, step, error):
    def fail(*arguments, **options):
        raise error

    target, _, name = step.rpartition(".")
    monkeypatch.setattr({"": exporting, "gate": gate, "os": os}[target], name, fail)
    with pytest.raises(type(error)):
        export_package(trained[0], str(tmp_path / "package"), ExportOptions())
    assert names_in(tmp_path) == []


KILLED = """
import os, signal, sys
from papilio.trainer.inference.export import export_run as export
from papilio.trainer.inference.export import exporter as exporting
def end(*arguments, **options):
    os.kill(os.getpid(), signal.{signal})
    signal.pause()
exporting.{step} = end
sys.exit(export.main(["--run", {run!r}, "--output", {output!r}, "--no-gate"]))
"""


def run_killed(trained, output, number, step):
    code = KILLED.format(signal=number, step=step, run=trained[0], output=str(output))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=REPOSITORY
    )


def test_a_killed_export_leaves_nothing_that_reads_as_a_package_and_the_next_one_sweeps_it(tmp_path, trained, caplog):
    result = run_killed(trained, tmp_path / "package", "SIGKILL", "write_manifest")
    assert result.returncode == -signal.SIGKILL
    (leftover,) = names_in(tmp_path)
    for folder in (tmp_path / leftover, tmp_path / leftover / "package"):
        with pytest.raises(PackageError, match=r"is not a package: it has no package\.json"):
            read_package(str(folder))
    (tmp_path / "package.notours.tmp").mkdir()
    with caplog.at_level(logging.INFO):
        export_package(trained[0], str(tmp_path / "package"), UNCERTIFIED)
    assert f"removing {tmp_path / leftover}, which an export that was cut off left behind" in caplog.text
    assert names_in(tmp_path) == ["package", "package.notours.tmp"]


def test_a_terminated_export_cleans_up(tmp_path, trained):
    result = run_killed(trained, tmp_path / "package", "SIGTERM", "add_encoding")
    assert (result.returncode, names_in(tmp_path)) == (128 + signal.SIGTERM, []), result.stderr


def test_another_export_to_the_same_output_is_left_alone(tmp_path, trained):
    with exporting._temporary_folder(str(tmp_path / "package")) as folder:
        Path(folder, "work").write_text("")
        export_package(trained[0], str(tmp_path / "package"), UNCERTIFIED)
        assert Path(folder, "work").exists()
    assert names_in(tmp_path) == ["package"]


def test_rows_that_span_little_are_told(tmp_path, data, caplog):
    tensors = random_weights(open_dataset(data), make_config(data))
    tensors["tables.t_a.weight"] *= 1e-4
    tensors["tables.t_b.weight"] = np.zeros_like(tensors["tables.t_b.weight"])
    run, _ = write_run(tmp_path / "run", data, tensors)
    with caplog.at_level(logging.INFO):
        package = export_package(run, str(tmp_path / "package"), UNCERTIFIED)
    assert [table.row_error.num_coarse_rows for table in package.manifest.tables] == [30, 0, 0]
    assert (
        "rows of t_a (100% of its rows) span so little that their scale, which is fp16, is a coarse one" in caplog.text
    )


def test_a_second_ctrl_c_while_the_first_one_cleans_up_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(path):
        signal.raise_signal(signal.SIGINT)
        Path(path, "half").unlink()
        signal.raise_signal(signal.SIGTERM)
        Path(path).rmdir()

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(locked_folder, "remove_local_folder", interrupted)
    with pytest.raises(KeyboardInterrupt), exporting._temporary_folder(str(tmp_path / "package")) as folder:
        Path(folder, "half").write_text("x")
        raise KeyboardInterrupt
    assert names_in(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_what_a_killed_export_to_another_output_left_is_told(tmp_path, caplog):
    left = tmp_path / "other.0123abcd.tmp"
    (left / "package").mkdir(parents=True)
    (tmp_path / "mine.0123abcd.tmp" / "something").mkdir(parents=True)
    with caplog.at_level(logging.INFO), exporting._temporary_folder(str(tmp_path / "package")):
        pass
    told = f"{left} was left behind by an export that was cut off; one to {tmp_path / 'other'} removes it"
    assert [record.getMessage() for record in caplog.records] == [told]
    assert names_in(tmp_path) == ["mine.0123abcd.tmp", "other.0123abcd.tmp"]
