"""`papilio checkpoint` on a real run: 2 ranks, killed and gone on with on 1 rank with another learning rate."""

import json
import re
import shutil
import subprocess
import sys
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from papilio.launch import cli
from papilio.launch.jobs import checkpoint_text
from tests.support.checkpoint_runs import STEPS, aucs, flip, folders, marker_of, num_bytes
from tests.support.checkpoints import saved_tensors
from tests.support.datasets import ROWS_PER_TABLE

REPOSITORY = Path(__file__).resolve().parents[3]
RUN_WITHOUT_TORCH = """
import json, sys
from papilio.launch.cli import main
statuses = [main(words) for words in json.loads(sys.argv[1])]
heavy = {"torch", "torchrec", "fbgemm_gpu", "torchx", "boto3"}
print(json.dumps([statuses, sorted({name.partition(".")[0] for name in sys.modules} & heavy)]))
"""


@pytest.mark.parametrize("columns", [80, 120])
def test_list_has_a_line_for_each_checkpoint_and_fits(papilio, run, columns):
    shutil.copytree(folders(run)[0], run / "checkpoints" / "step_0000000025-abcdef")
    (run / "checkpoints" / "step_0000000025-abcdef" / "checkpoint.json").unlink()
    flip(folders(run)[0] / "checkpoint.json")
    status, out, _ = papilio("list", run, columns=columns)
    table = [line for line in out.splitlines() if line.startswith(("name", "step_"))]
    assert status == 0 and all(len(line) <= columns for line in table)
    best = max(STEPS[1:], key=lambda step: aucs(run)[step])
    for line, folder, step in zip(table[1:], folders(run), [*STEPS, 25], strict=True):
        assert line.startswith(folder.name)
        if step in STEPS[1:]:
            assert f"{aucs(run)[step]:.4f}" in line
            assert ("newest" in line, "best" in line.split()[-1]) == (step == 20, step == best)
            assert ("2026" in line) == (columns == 120) or marker_of(folder)["saved_at"][:4] != "2026"
    assert table[1].endswith("damaged") and table[5].endswith("incomplete")
    assert "the next start of the job removes what was cut off" in out


def test_list_tells_damage_from_another_version(papilio, run):
    write_marker(folders(run)[0], {**marker_of(folders(run)[0]), "format_version": 99})
    flip(folders(run)[1] / "checkpoint.json")
    lines = papilio("list", run)[1].splitlines()
    assert lines[3].endswith("other version") and lines[4].endswith("damaged")
    assert "other version: another Papilio wrote it in a format that this one does not read" in lines
    assert "damaged: the marker cannot be read; `papilio checkpoint verify` says why" in lines


def test_list_for_machines(papilio, run):
    (folders(run)[0] / "checkpoint.json").unlink()
    entries = json.loads(papilio("list", run, "--json")[1])
    assert entries[0] == {"name": folders(run)[0].name, "status": "incomplete"}
    for entry, folder, step in zip(entries[1:], folders(run)[1:], STEPS[1:], strict=True):
        assert (entry["name"], entry["step"], entry["num_bytes"]) == (folder.name, step, num_bytes(folder))
        assert entry["validation_auc"] == aucs(run)[step]
        assert entry["world_size"] == (2 if step <= 15 else 1)
    assert [entry["is_newest"] for entry in entries[1:]] == [False, False, True]


def test_a_run_is_found_by_several_of_its_folders(papilio, run, tmp_path):
    def listed(place):
        """What is listed, but for the folder and the ages."""
        return [re.sub(r" +\d+ s +", " ", line) for line in papilio("list", place)[1].splitlines()[2:]]

    expected = listed(run)
    assert listed(run / "checkpoints") == expected
    config_text = (run / "config.json").read_text()
    (run / "config.json").write_text('{"na')
    assert listed(run) == expected, "a damaged config hides no checkpoint"
    (run / "config.json").write_text(config_text)
    shutil.move(run / "checkpoints", tmp_path / "elsewhere")
    config = json.loads((run / "config.json").read_text())
    config["checkpoint"]["folder"] = str(tmp_path / "elsewhere")
    (run / "config.json").write_text(json.dumps(config))
    assert listed(run) == expected


def test_a_run_in_an_object_store(papilio, run, s3, tmp_path):
    for path in (run / "checkpoints").rglob("*"):
        if path.is_file():
            s3.client.put_object(Bucket=s3.bucket, Key=f"r/{path.relative_to(run)}", Body=path.read_bytes())
    for place in (f"s3://{s3.bucket}/r", f"s3://{s3.bucket}/r/checkpoints"):
        assert papilio("list", place)[1].count("step_") == 4
    status, out, _ = papilio("verify", f"s3://{s3.bucket}/r", "--all")
    assert status == 0 and out.count("sound") == 4
    assert papilio("export-dense", f"s3://{s3.bucket}/r", "5", "--output", tmp_path / "out")[0] == 0
    assert papilio("prune", f"s3://{s3.bucket}/r", "--keep-last", "1")[0] == 0
    assert papilio("list", f"s3://{s3.bucket}/r")[1].count("step_") == 1


def test_a_wrong_run_names_those_near_by(papilio, run):
    (run.parent / "data").mkdir()
    status, _, error = papilio("list", run.parent / "frist")
    assert status == 2 and error.count("\n") == 1
    assert f"{run.parent}/frist does not exist; did you mean {run}?" in error
    assert f"is a folder of runs; give one of them: {run}" in papilio("list", run.parent)[2]
    assert "data does not exist" not in papilio("list", run.parent / "data")[2]
    one = folders(run)[0]
    assert f"{one} is one checkpoint; write {one.parent} {one.name}" in papilio("list", one)[2]
    assert "no storage is known for gs://b/r" in papilio("list", "gs://b/r")[2]


def test_a_run_without_checkpoints(papilio, run):
    shutil.rmtree(run / "checkpoints")
    assert papilio("list", run)[:2] == (0, f"no checkpoints in {run}/checkpoints yet\n")
    status, _, error = papilio("show", run)
    assert status == 1
    assert "holds no complete checkpoint (none at all); the config's checkpoint.every_steps makes them" in error


@pytest.mark.parametrize(
    ("word", "step"), [("latest", 20), ("best", None), ("10", 10), ("step_0000000015", 15), ("step_0000000005-", 5)]
)
def test_checkpoints_are_named_in_several_ways(papilio, run, word, step):
    step = step or max(aucs(run), key=lambda step: aucs(run)[step])
    assert json.loads(papilio("show", run, word, "--json")[1])["step"] == step


def test_a_wrong_name_gives_the_nearest(papilio, run):
    (folders(run)[0] / "checkpoint.json").unlink()
    names = [folder.name for folder in folders(run)]
    status, _, error = papilio("show", run, names[0])
    assert status == 1 and f"{names[0]} was never completed (it has no checkpoint.json)" in error
    assert (
        f"there is no checkpoint {names[1]}x in {run}/checkpoints; did you mean {names[1]}?"
        in (papilio("show", run, f"{names[1]}x")[2])
    )
    assert f"there are {', '.join(names[1:])}" in papilio("show", run, "7")[2]
    assert f"there are {', '.join(names[1:])}" in papilio("verify", run, "step_")[2]


def test_no_checkpoint_is_the_best_without_validations(papilio, run):
    for folder in folders(run):
        tree = marker_of(folder)
        tree["progress"]["validations"] = []
        write_marker(folder, tree)
    assert "was validated at its own step, so none is the best; name one, or latest" in papilio("show", run, "best")[2]
    assert "validated   never" in papilio("show", run)[1]


def write_marker(folder, tree):
    from papilio.trainer.checkpoint.format import Marker

    (folder / "checkpoint.json").write_text(Marker(**tree).to_json())


@pytest.mark.parametrize("columns", [80, 120])
def test_show_tells_everything_and_fits(papilio, run, columns):
    status, out, _ = papilio("show", run, columns=columns)
    assert status == 0 and max(map(len, out.splitlines())) <= columns
    words = " ".join(out.split())
    tree = marker_of(folders(run)[-1])
    assert "by 1 rank" in words and "step 20; epoch 0, sample 400 of 403" in words
    assert f"after step 20: AUC {aucs(run)[20]:.4f}" in words
    assert "tables rowwise_adagrad (learning rate 0.05), dense part sgd (learning rate 0.1)" in words
    assert "403 train, 90 validation and 60 test samples; 6 shards" in words
    assert f"torch {tree['versions']['torch']}" in words
    assert "plan 1 rank (" in words and "3 table_wise" in words
    assert "from the start on 2 ranks" in words and "from step 15 on 1 rank" in words
    assert "optimizer.sparse.learning_rate = 0.05, was 0.1" in words
    for name, rows in ROWS_PER_TABLE.items():
        (line,) = [line for line in out.splitlines() if line.startswith(f"t_{name} ")]
        assert line.split()[1:6] == [str(rows), "8", "float32", *checkpoint_text.size(rows * 32).split()]


def test_show_tells_which_columns_have_row_wise_states_of_their_own(papilio, run):
    out = papilio("show", run, "5")[1]
    assert "sum by row, 2 blocks" in out
    assert "blocks: of columns, each with a value of its own for a row; they begin at column\n0, 4" in out
    assert "by row, " not in papilio("show", run, "20")[1]


def test_show_of_many_tables_lists_the_largest(papilio, run, monkeypatch):
    monkeypatch.setattr(checkpoint_text, "MAX_TABLES", 2)
    monkeypatch.setattr(checkpoint_text, "NUM_LARGEST", 1)
    out = papilio("show", run)[1]
    assert "t_a " in out and "t_b " not in out and "2 smaller" in out
    assert "t_b " in papilio("show", run, "--all")[1]


def test_show_for_machines_has_all_of_the_marker_and_the_tensors(papilio, run):
    tree = json.loads(papilio("show", run, "5", "--json")[1])
    folder = folders(run)[0]
    marker = marker_of(folder)
    assert {key: tree[key] for key in marker} == marker
    arrays = saved_tensors(folder)
    assert {key: (of["dtype"], tuple(of["shape"]), of["num_bytes"]) for key, of in tree["tensors"][0].items()} == {
        key: (str(array.dtype), array.shape, array.nbytes) for key, array in arrays.items()
    }


def test_a_damaged_plan_does_not_hide_the_rest(papilio, run):
    flip(folders(run)[-1] / "plan.json")
    status, out, _ = papilio("show", run)
    assert status == 0 and "plan.json is damaged" in " ".join(out.split())


def test_a_plan_of_another_version_does_not_hide_the_rest(papilio, run):
    folder = folders(run)[-1]
    (folder / "plan.json").write_text('{"format_version": 0}')
    tree = marker_of(folder)
    tree["files"]["plan.json"] = [21, zlib.crc32(b'{"format_version": 0}')]
    write_marker(folder, tree)
    status, out, _ = papilio("show", run)
    assert status == 0 and "plan        in the format of another Papilio; plan.json in its folder has it" in out


def test_nothing_of_it_imports_torch(run, tmp_path):
    commands = [["list"], ["show"], ["verify"], ["prune", "--keep-last", "2"], ["export-dense", "--output", "out"]]
    words = json.dumps([["checkpoint", action, str(run), *rest] for action, *rest in commands])
    command = [sys.executable, "-c", RUN_WITHOUT_TORCH, words]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [[0] * 5, []]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: ACTION"),
        (["lst", "r"], "invalid choice: 'lst'"),
        (["list"], "the following arguments are required: RUN"),
        (["prune", "r"], "the following arguments are required: --keep-last"),
        (["verify", "r", "--al"], "unknown argument --al"),
    ],
)
def test_a_wrong_command_line_is_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["checkpoint", *words])
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (172800, "2 days")],
)
def test_ages_are_told_in_the_unit_that_suits_them(run, seconds, said):
    from papilio.trainer.checkpoint.format import Marker

    marker = Marker(**{**marker_of(folders(run)[0]), "saved_at": "2026-01-01T00:00:00+00:00"})
    assert checkpoint_text.age(marker, datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)) == said
