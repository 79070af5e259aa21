import errno
import json
import os
from pathlib import Path

import pytest

from papilio.launch import cli

ROWS = ["label,age,color", "1,20,red", "0,30,blue", "0,,red", "1,50,green"]
SCHEMA = """
label = "label"
dense = [{ name = "age" }]
categorical = [{ name = "color" }]
"""


def test_preprocess_makes_a_data_set_and_says_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.csv").write_text("\n".join([ROWS[0], *(ROWS[1:] * 5)]) + "\n")
    (tmp_path / "schema.toml").write_text(SCHEMA)
    output = str(tmp_path / "out")
    words = ["--source", "table", "--schema", f"{tmp_path}/schema.toml", "--input", f"{tmp_path}/rows.csv"]
    words += ["--output", output, "--split", "fraction", "--fractions", ".5", ".25", ".25", "--num-workers", "1"]
    assert cli.main(["preprocess", *words]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith(f"{output}: 20 rows; split: ")
    # Of each four rows in order two are clicks.
    assert [line.split() for line in lines[:3]] == [
        ["train", "10", "rows", "label", "rate", "0.5000"],
        ["validation", "5", "rows", "label", "rate", "0.4000"],
        ["test", "5", "rows", "label", "rate", "0.6000"],
    ]
    assert lines[3].startswith("warning: small splits, whose figures say little (train 10 rows, 5 of its rarer")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["data_schema"]["categorical"][0]["name"] == "color"


def test_generate_makes_a_data_set_and_says_how_good_a_model_can_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    assert cli.main(["generate", "--rows", "2000", "--output", output, "--seed", "5"]) == 0
    header, train, *_ = capsys.readouterr().out.splitlines()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    split = manifest["splits"]["train"]
    assert header.startswith(f"{output}: 2,000 rows; split: ")
    assert train.split()[:3] == ["train", "1,800", "rows"]
    assert train.endswith(f"best possible AUC {split['best_auc']:.4f}, logloss {split['best_logloss']:.4f}")


def test_an_error_of_the_data_is_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.txt").write_text("not a click log\n")
    words = ["--source", "criteo", "--input", f"{tmp_path}/train.txt", "--output", f"{tmp_path}/out"]
    assert cli.main(["preprocess", *words, "--num-workers", "1"]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("papilio preprocess: error: ")
    assert f"{tmp_path}/train.txt" in error
    assert "Traceback" not in error


def test_a_wrong_shape_names_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--shape", "x", "--rows", "2000", "--output", f"{tmp_path}/out"]) == 2
    assert "--shape x: there is no shape 'x'; choose one of criteo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("/proc/nope/x", "/proc/nope: No such file or directory"),
        ("{folder}/rows.csv", "rows.csv"),
        ("{folder}/rows.csv/x", "rows.csv/x: Not a directory"),
        ("/dev/full/x", "/dev/full/x: Not a directory"),
    ],
)
@pytest.mark.parametrize("verb", ["preprocess", "generate"])
def test_an_output_that_cannot_be_made_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, output: str, reason: str
) -> None:
    (tmp_path / "rows.csv").write_text("\n".join(ROWS) + "\n")
    (tmp_path / "schema.toml").write_text(SCHEMA)
    words = ["--source", "table", "--schema", f"{tmp_path}/schema.toml", "--input", f"{tmp_path}/rows.csv"]
    words = [*words, "--num-workers", "1"] if verb == "preprocess" else ["--rows", "2000"]
    assert cli.main([verb, *words, "--output", output.format(folder=tmp_path)]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"papilio {verb}: error: ")
    assert reason in last
    assert last.endswith("; give another --output")


def test_a_full_disk_is_one_line_and_says_how_to_continue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("papilio.launch.jobs.data.generate", fill)
    assert cli.main(["generate", "--rows", "2000", "--output", f"{tmp_path}/out"]) == 1
    assert capsys.readouterr().err.endswith(
        f"{tmp_path}/out: No space left on device; free some and give the same command again, or another --output\n"
    )
