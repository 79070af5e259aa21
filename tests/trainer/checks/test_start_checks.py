"""What is refused before any rank starts, in one line that names the key; and data sets that lack held-out rows."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.manifest import DatasetError, read_manifest
from papilio.launch import cli
from papilio.launch.jobs import local as local_jobs
from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.checkpoint.selection import BEST, find_checkpoint
from papilio.trainer.checks.start_checks import check_start
from papilio.trainer.config_file import ConfigError
from papilio.trainer.metrics import MetricValues
from papilio.trainer.run.folder import data_identity
from papilio.trainer.run.summary import Summary
from papilio.trainer.storage.api import StorageError
from papilio.trainer.train import fail
from tests.support.datasets import SPLIT_ROWS, write_dataset
from tests.support.datasets import edit_manifest as edit_values
from tests.support.small_runs import make_config, metric_lines, run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def train_only(tmp_path_factory):
    """A data set as `--split fraction --fractions 1 0 0` makes it: empty splits."""
    return write_dataset(tmp_path_factory.mktemp("data"), split_rows={"train": 103, "validation": 0, "test": 0})


@pytest.fixture
def command(monkeypatch, tmp_path):
    """`papilio train` of a small recipe, which must start nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local_jobs, "run_locally", lambda app: pytest.fail("ranks were started"))

    def call(data, *settings):
        (tmp_path / "recipe.toml").write_text(f'name = "small"\n[data]\npath = "{data}"\n')
        return cli.main(["train", "--recipe", "recipe.toml", "--nproc", "4", *settings])

    return call


def edit_manifest(data, tmp_path, **changes):
    """A data set whose manifest alone there is, with other values."""
    tree = json.loads(Path(data, "manifest.json").read_text()) | changes
    (tmp_path / "edited").mkdir()
    (tmp_path / "edited" / "manifest.json").write_text(json.dumps(tree))
    return tmp_path / "edited"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--data.path=nowhere"], "data.path: nowhere is not a complete data set"),
        (["--output.run_dir=/proc/nope/x"], "output.run_dir = /proc/nope/x: could not create folder /proc/nope/x"),
        (["--output.runs_dir=/proc/nope"], "output.runs_dir = /proc/nope: could not create folder /proc/nope"),
        (["--output.run_dir=recipe.toml/x"], "output.run_dir = recipe.toml/x: could not "),
        (["--checkpoint.folder=recipe.toml"], "checkpoint.folder = recipe.toml: could not"),
        (["--sharding.plan=none.json"], "plan file none.json does not exist"),
        (["--sharding.hardware=dgx_x"], "dgx_x"),
        (["--train.epoch=3"], "there is no key train.epoch; did you mean train.epochs?"),
    ],
)
def test_what_would_go_wrong_on_every_rank_is_said_once(command, data, capsys, tmp_path, settings, message):
    before = sorted(tmp_path.iterdir())
    assert command(data, *settings) == 78
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("papilio train: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(tmp_path.iterdir()) == [*before, tmp_path / "recipe.toml"], "no folder is left behind"


def test_a_data_set_that_cannot_be_trained_on_is_refused(command, data, capsys, tmp_path):
    def refused(folder):
        assert command(folder) == 78
        return capsys.readouterr().err

    edited = edit_manifest(data, tmp_path, transform_version=0)
    assert "transform version 0; this Papilio reads" in refused(edited)
    (edited / "manifest.json").write_text(Path(data, "manifest.json").read_text())
    assert f"data.path: shard {edited}/train/0.arrow is missing; restore it" in refused(edited)
    (edited / "manifest.json").write_bytes(b"\xff\xfe")
    assert f"data.path: {edited}/manifest.json is damaged ('utf-8' codec" in refused(edited)
    (edited / "manifest.json").unlink()
    (edited / "manifest.json").symlink_to("manifest.json")
    assert refused(edited).startswith("papilio train: error: data.path")
    empty = write_dataset(tmp_path / "empty", split_rows={"train": 0, "validation": 5, "test": 0})
    assert "has no rows in split 'train'; splits with rows: validation" in refused(empty)


@pytest.fixture
def evaluation(monkeypatch, tmp_path, data):
    """`papilio evaluate` of a run whose only checkpoint is damaged, with one file of it replaced."""
    monkeypatch.setattr(local_jobs, "run_locally", lambda app: 0)
    run_dir, name = tmp_path / "run", "step_0000000008-abcdef"
    config = make_config(data, run_dir).model_dump(mode="json")
    texts = {
        "config.json": json.dumps({"format_version": 1, **config}),
        "data.json": json.dumps(data_identity(open_dataset(str(data)))),
        f"checkpoints/{name}/checkpoint.json": "{",
    }

    def call(*options, change=lambda config: None, **changed):
        change(config)
        texts["config.json"] = json.dumps({"format_version": 1, **config})
        for file, text in {**texts, **{f"{key}.json": value for key, value in changed.items()}}.items():
            (run_dir / file).parent.mkdir(parents=True, exist_ok=True)
            (run_dir / file).write_text(text)
        return cli.main(["evaluate", "--run", str(run_dir), "--nproc", "3", *options])

    return call


def test_an_evaluation_that_would_fail_is_refused_before_it_starts(evaluation, capsys):
    assert evaluation() == 78, "of the latest, should it be damaged, the one before is taken, but there is none"
    assert "checkpoint.json is damaged: it is not a checkpoint's marker" in capsys.readouterr().err

    def independent(config):
        config["sharding"]["replicas"] |= {"num_groups": 2, "independent_tables": True}

    def elsewhere(config):
        config["sharding"]["replicas"] = {}
        config["sharding"]["hardware"] = "gone.toml"

    cases = [
        (["--checkpoint", "8"], {}, "checkpoint.json is damaged: it is not a checkpoint's marker"),
        (["--checkpoint", "9" * 5_000], {}, f"there is no checkpoint {'9' * 99} in "),
        (["--checkpoint", "a\x1b[2J"], {}, "there is no checkpoint 'a\\x1b[2J' in "),
        ([], {"data": "{}"}, "differs from the one"),
        ([], {"data": "["}, "data.json is not JSON"),
        ([], {"change": independent}, "2 groups, which cannot share 3 rank(s) evenly; give --nproc 2"),
        ([], {"change": elsewhere}, "hardware gone.toml: no such profile or file"),
    ]
    for options, changes, message in cases:
        assert evaluation(*options, **changes) == 78, message
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_a_shard_that_was_cut_short_is_found_before_training(tmp_path):
    data = write_dataset(tmp_path / "data")
    shard = Path(data, "validation", "1.arrow")
    size = shard.stat().st_size
    os.truncate(shard, size - 8)
    with pytest.raises(ValueError, match=rf"{shard} has {size - 8:,} bytes, not {size:,}; restore it"):
        check_start(make_config(data, tmp_path / "run"))


def test_without_validation_rows_a_run_trains_saves_and_says_what_it_lacks(two_ranks, train_only, tmp_path):
    config = make_config(train_only, tmp_path / "run", train={"epochs": 2}, checkpoint={"every_steps": 4})
    printed = two_ranks.run(run, config)[0]
    finding = (
        f"data set {train_only} has no rows in split validation: nothing measures what the model learns; none is the "
        "best, the newest 100 checkpoint(s) are kept (checkpoint.keep_last)"
    )
    assert f"WARNING: {finding}\n" in printed
    assert "validation after" not in printed
    assert " not measured: no held-out rows\n" in printed
    assert " best " not in printed.replace("none is the best", "")
    folder = CheckpointFolder(str(tmp_path / "run" / "checkpoints"))
    saved = [(found.marker.step, found.marker.saved_for) for found in folder.committed()]
    assert saved == [(4, "every_steps"), (8, "every_steps"), (12, "end")]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["final"], summary["best_validation_auc"]) == ({}, None)
    assert summary["findings"] == [finding]
    assert {line["kind"] for line in metric_lines(tmp_path / "run")} == {"train"}
    with pytest.raises(ValueError, match="was validated at its own step, so none is the best"):
        find_checkpoint(folder, BEST)


def test_what_needs_validation_rows_is_refused_by_its_key(train_only, tmp_path):
    config = make_config(train_only, tmp_path / "run", train={"evaluate_every_steps": 2})
    with pytest.raises(ConfigError, match=r"train\.evaluate_every_steps = 2, but data set .* has no rows in split 'v"):
        check_start(config)


def test_a_data_set_of_other_columns_is_not_evaluated(one_rank, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(local_jobs, "run_locally", lambda app: pytest.fail("ranks were started"))
    one_rank.run(run, make_config(data, tmp_path / "run", train={"max_steps": 1}))
    other = write_dataset(tmp_path / "other")
    edit_values(other, '"transform": "identity"', '"transform": "log1p"')
    assert cli.main(["evaluate", "--run", f"{tmp_path}/run", "--data", str(other)]) == 78
    err = capsys.readouterr().err
    assert f"data set {other} differs from the one {tmp_path}/run was trained on in: schema; its ids" in err


def test_labels_of_one_class_are_a_finding(one_rank, tmp_path):
    data = write_dataset(tmp_path / "data", split_rows={**SPLIT_ROWS, "train": 100, "validation": 1})
    edit_values(data, f'"num_positives": {read_manifest(data).splits["train"].num_positives}', '"num_positives": 100')
    printed = one_rank.run(run, make_config(data, tmp_path / "run", train={"epochs": 1}))[0]
    of_train = "label rate on train is 1: all 100 labels are the same, so there is nothing to learn from"
    assert f"WARNING: {of_train}" in printed
    findings = json.loads((tmp_path / "run" / "summary.json").read_text())["findings"]
    assert findings[0].startswith(of_train)
    assert "all 1 labels are the same, so AUC, NE and calibration cannot be measured" in findings[1]
    assert "label rate on validation is" in printed.split("run folder")[-1], "the summary shows it"


def test_a_summary_is_read_as_it_was_written(tmp_path):
    values = MetricValues(5, 1.0, float("nan"), float("nan"), 0.5, float("nan"), 1.0, 0.1)
    written = Summary("r", 2, "cpu", 9, 3, 60, 1.0, 60.0, 0.1, {"test": values}, None, None, ("f",))
    assert repr(Summary.from_dict(json.loads(json.dumps(written.to_dict())))) == repr(written)


def test_ranks_that_find_the_same_say_it_once(monkeypatch, capsys):
    """The first says it, whoever it is; another mistake is said as well."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "WORLD_SIZE": "4",
        "TORCHELASTIC_RUN_ID": "once",
        "PET_RDZV_ENDPOINT": f"127.0.0.1:{store.port}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    said = []
    for rank, text in ((2, "wrong"), (0, "wrong"), (1, "other")):
        monkeypatch.setenv("RANK", str(rank))
        assert fail("papilio train", DatasetError(text)) == 78
        said.append(capsys.readouterr().err)
    assert said == ["papilio train: error: wrong\n", "", "papilio train: error: other\n"]
    assert fail("papilio train", dist.DistNetworkError("Failed to recv, got 0 bytes")) == 1
    assert "this rank could not join the others, of which rank 2 (host " in capsys.readouterr().err


def test_what_may_pass_is_tried_again(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    statuses = {number: fail("t", StorageError("m", number)) for number in (errno.ENOSPC, errno.EIO, errno.EACCES)}
    assert statuses == {errno.ENOSPC: 1, errno.EIO: 1, errno.EACCES: 78}
