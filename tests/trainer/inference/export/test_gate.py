"""The gate on real packages: figures against scikit-learn and the papers' formulas, refusals, and what they name."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sklearn import metrics as sklearn_metrics

from papilio.data_pipeline.dataset import open_dataset
from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.inference.export import gate
from papilio.trainer.inference.export.export_options import ExportOptions
from papilio.trainer.inference.export.exporter import export_package
from papilio.trainer.inference.export.gate import GateError
from papilio.trainer.inference.export.held_out import HeldOut
from papilio.trainer.inference.export.quality_report import QualityReport
from papilio.trainer.inference.export.trained_model import open_trained_model
from papilio.trainer.inference.package.format import DENSE, PRECISIONS, TABLES
from papilio.trainer.inference.package.table_writer import TableChoice
from papilio.trainer.inference.package.writer import write_model
from tests.support.package_bytes import values_of
from tests.support.scored_runs import probabilities_of, read_split, write_scored_run
from tests.support.trained_runs import make_config

CROSS = {"architecture": "dlrm_dcnv2", "dcn_num_layers": 2, "dcn_low_rank_dim": 3, "pooling": "mean"}
FEATURES = ("a", "b", "m")
# Zeros of the others stay zeros in fp16.
FRAGILE = ExportOptions(quantize="int8", tables=(("t_b", "fp16"), ("t_m", "fp16")))


def destroy_for_codes(tensors):
    """Give t_a a column so large that 256 steps leave the others none; it meets zeros only, and so changes no score."""
    for feature in FEATURES:
        tensors[f"tables.t_{feature}.weight"][:, -1] = 0
    tensors["tables.t_a.weight"][:, -1] = 3_000
    for part in ("weight", "bias"):
        tensors[f"dense.model.dense_arch.2.{part}"][-1] = 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_scored_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def fragile_run(tmp_path_factory):
    return write_scored_run(tmp_path_factory.mktemp("fragile"), change=destroy_for_codes)


def make_package(run, folder, choices):
    data, run_dir, _ = run
    checkpoints = CheckpointFolder(str(Path(run_dir, "checkpoints")))
    model = open_trained_model(checkpoints, checkpoints.committed()[-1].name)
    every = {table: choices.get(table, TableChoice("fp32")) for table in model.tables}
    dataset = open_dataset(data)
    return write_model(model, dataset, every, str(folder), run=run_dir, on_bytes=lambda num_bytes: None)


def check(run, tmp_path, choices, min_auc_ratio=0.0, spoil=lambda package: None):
    reference = make_package(run, tmp_path / "reference", {})
    package = make_package(run, tmp_path / "package", choices)
    spoil(package)
    held_out = HeldOut.for_gate(open_dataset(run[0]))
    return gate.check(reference, package, held_out, min_auc_ratio=min_auc_ratio)


def all_tables(precision, quantizer="minmax"):
    return {f"t_{name}": TableChoice(precision, quantizer) for name in FEATURES}


def stored_tables(folder, entries):
    """Values by feature, decoded by NumPy alone."""
    raw = np.fromfile(Path(folder, TABLES), np.uint8)
    tables = {}
    for entry in entries:
        rows = raw[entry["offset"] : entry["offset"] + entry["rows"] * entry["row_bytes"]]
        tables[entry["feature"]] = values_of(rows.reshape(entry["rows"], -1), entry["precision"], entry["dim"])
    return tables


def probabilities(run, config, tables=None):
    shards = read_split(run[0], "test")
    found = [probabilities_of(config, run[2], shard, tables) for _, shard in shards]
    return np.concatenate(found), np.concatenate([labels for labels, _ in shards])


@pytest.mark.parametrize(("precision", "model"), [("int8", {}), ("int4", CROSS), ("int2", {})])
def test_the_figures_are_those_of_the_stored_bytes(tmp_path, precision, model):
    run = write_scored_run(tmp_path, **model)
    package = make_package(run, tmp_path / "decoded", all_tables(precision))
    report = QualityReport.model_validate(check(run, tmp_path, all_tables(precision)).report)
    config = make_config(run[0], **model)
    tables = stored_tables(package.folder, [table.model_dump() for table in package.manifest.tables])
    before, labels = probabilities(run, config)
    after, _ = probabilities(run, config, tables)
    always = sklearn_metrics.log_loss(labels, np.full(len(labels), labels.mean()))
    for quality, found in ((report.comparison.reference, before), (report.comparison.candidate, after)):
        assert quality.auc == pytest.approx(sklearn_metrics.roc_auc_score(labels, found), abs=1e-5)
        assert quality.ne == pytest.approx(sklearn_metrics.log_loss(labels, found) / always, rel=1e-5)
        assert quality.calibration == pytest.approx(found.sum() / labels.sum(), rel=1e-5)
    differences = report.comparison.differences
    assert differences.max_absolute == pytest.approx(np.abs(after - before).max(), rel=1e-3, abs=1e-6)
    assert report.held_out.num_samples == len(labels) == 2_100
    fp32 = {name: run[2][f"tables.t_{name}.weight"] for name in FEATURES}
    for table in report.tables:
        alone, _ = probabilities(run, config, {**fp32, table.feature: tables[table.feature]})
        divergence = before * np.log(before / alone) + (1 - before) * np.log((1 - before) / (1 - alone))
        assert table.expected_increase == pytest.approx(divergence.mean(), rel=1e-2, abs=1e-9)
        auc = sklearn_metrics.roc_auc_score(labels, alone) - sklearn_metrics.roc_auc_score(labels, before)
        assert table.chosen.auc_change == pytest.approx(auc, abs=2e-5)
        assert [option.precision for option in table.options] == [precision, *(p for p in PRECISIONS if p != precision)]


def test_other_precisions_cost_what_a_package_of_them_would(run, tmp_path):
    """What the report says of a table at a precision is what a package with that table so stored is measured at."""
    from_int8 = QualityReport.model_validate(check(run, tmp_path / "8", all_tables("int8")).report)
    from_int2 = QualityReport.model_validate(check(run, tmp_path / "2", all_tables("int2")).report)
    for one, other in zip(from_int8.tables, from_int2.tables, strict=True):
        by_precision = {option.precision: option for option in one.options}
        for option in other.options:
            if option.precision in {"fp16", "int8"}:
                found = by_precision[option.precision].expected_increase
                assert found == pytest.approx(option.expected_increase, rel=1e-3, abs=1e-12)


def test_an_fp32_package_is_its_own_reference(run, tmp_path):
    package = make_package(run, tmp_path / "package", {})
    held_out = HeldOut.for_gate(open_dataset(run[0]))
    result = gate.check(package, package, held_out, min_auc_ratio=1.0)
    assert (result.summary["auc_ratio"], result.summary["ne_ratio"]) == (1, 1)
    assert result.report["comparison"]["differences"]["max_absolute"] == 0
    assert all(table["options"][0]["expected_increase"] == 0 for table in result.report["tables"])


def test_the_summary_is_what_the_report_says(run, tmp_path):
    result = check(run, tmp_path, all_tables("int8"), 0.999)
    comparison = result.report["comparison"]
    assert result.summary == {
        "auc": comparison["candidate"]["auc"],
        "fp32_auc": comparison["reference"]["auc"],
        "auc_ratio": comparison["auc_ratio"]["value"],
        "min_auc_ratio": 0.999,
        "ne": comparison["candidate"]["ne"],
        "fp32_ne": comparison["reference"]["ne"],
        "ne_ratio": comparison["ne_ratio"]["value"],
        "num_samples": 2_100,
    }
    assert result.page.startswith("<!doctype html>")


def test_a_package_of_two_bits_is_refused(run, tmp_path):
    with pytest.raises(GateError) as refused:
        check(run, tmp_path, all_tables("int2"), 0.999)
    message = str(refused.value)
    assert re.match(
        r"the package is not written:\n  its AUC is 0\.\d{6}, 9\d\.\d{4} % of the fp32 model's 0\.\d{6}", message
    )
    assert "where 99.9000 % is asked for\n  its NE is" in message
    assert "where at most 100.1000 % is allowed" in message
    assert "each alone, on 2,100 samples of split test:" in message


def test_shuffled_rows_of_a_table_are_found_though_quantizing_again_would_be_fine(run, tmp_path):
    def shuffle(package):
        (table,) = (table for table in package.manifest.tables if table.name == "t_b")
        raw = np.memmap(package.path(TABLES), np.uint8, "r+")
        rows = raw[table.offset : table.offset + table.num_bytes].reshape(table.rows, -1)
        rows[:] = np.roll(rows, 1, axis=0)
        raw.flush()

    with pytest.raises(GateError) as refused:
        check(run, tmp_path, all_tables("int8"), 0.999, spoil=shuffle)
    first = next(line for line in str(refused.value).splitlines() if line.startswith("  t_"))
    assert re.match(r"  t_b in int8: \S+ nats of log loss a sample \(\d+ % of all tables'\), AUC -0\.\d+", first)
    assert re.search(r"--quantize int8 --table t_b=(fp16|fp32)$", str(refused.value))


def test_a_dense_part_that_is_not_the_trained_one_is_not_blamed_on_tables(run, tmp_path):
    def negate(package):
        tensors = load_file(package.path(DENSE))
        save_file({name: -values for name, values in tensors.items()}, package.path(DENSE))

    with pytest.raises(GateError, match=r"no precision of tables would pass: .* its dense part is not the trained one"):
        check(run, tmp_path / "int8", all_tables("int8"), 0.999, spoil=negate)
    with pytest.raises(GateError) as refused:
        check(run, tmp_path / "fp32", {}, 0.999, spoil=negate)
    assert "cost most" not in str(refused.value)


def test_a_destroyed_table_is_refused_and_named_and_nothing_is_left(fragile_run, tmp_path):
    with pytest.raises(GateError) as refused:
        export_package(fragile_run[1], str(tmp_path / "package"), FRAGILE)
    assert list(tmp_path.iterdir()) == []
    message = str(refused.value)
    costly = [line for line in message.splitlines() if line.startswith("  t_")]
    assert costly[0].startswith("  t_a in int8: ")
    share = re.search(r"\((\d+) % of all tables'\)", costly[0])
    assert int(share[1]) >= 98


def test_what_the_refusal_says_would_pass_passes(fragile_run, tmp_path):
    with pytest.raises(GateError) as refused:
        export_package(fragile_run[1], str(tmp_path / "refused"), FRAGILE)
    told = str(refused.value)
    assert told.splitlines()[-1] == "  --quantize fp16"
    package = export_package(fragile_run[1], str(tmp_path / "package"), ExportOptions(quantize="fp16"))
    measured = re.search(r"what would pass, measured on the same 2,100 samples: AUC (\S+) % and NE (\S+) %", told)
    certified = package.manifest.certified
    assert f"{certified['auc_ratio'] * 100:.4f}" == measured[1]
    assert f"{certified['ne_ratio'] * 100:.4f}" == measured[2]
    assert certified["auc_ratio"] >= 0.999
    report = QualityReport.model_validate(package.read_json("report.json"))
    assert report.failures == []
    assert Path(package.path("report.html")).read_text().startswith("<!doctype html>")


def test_a_result_within_noise_is_told(run, tmp_path, caplog):
    passed = check(run, tmp_path / "1", all_tables("int8"))
    # Just reached; both intervals are wider than this.
    threshold = min(1.0, passed.summary["auc_ratio"], 2 - passed.summary["ne_ratio"]) - 1e-7
    with caplog.at_level("WARNING"):
        check(run, tmp_path / "2", all_tables("int8"), threshold)
    assert "on other samples this package could have been refused" in caplog.text
