"""A study of real jobs on one and two ranks, beside plans for more hosts; and what is refused before any job."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from papilio.data_pipeline.generate.generate_options import GenerateOptions
from papilio.data_pipeline.generate.generator import generate
from papilio.launch.cli import parse_arguments
from papilio.launch.jobs import study as study_jobs
from papilio.launch.jobs.study import StudyRow
from papilio.launch.jobs.study_table import format_study
from papilio.launch.usage import UsageError
from papilio.launch.verbs import VERBS

REPOSITORY = Path(__file__).resolve().parents[3]
SMALL = (
    *("--model.embedding_dim=4", "--model.dense_arch_layer_sizes=[16]", "--model.over_arch_layer_sizes=[16]"),
    *("--train.global_batch_size=256", "--train.precision=fp32"),
)


def study(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "papilio.launch.cli",
        "study",
        "--recipe",
        "quickstart",
        "--output",
        str(folder / "study"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*command, "--steps", "20", *words, *SMALL, f"--data.path={folder / 'data'}"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
        check=False,
    )


def test_measured_and_predicted_side_by_side_and_nothing_is_repeated(tmp_path: Path) -> None:
    generate(GenerateOptions(shape="criteo_small", num_rows=4096, output=str(tmp_path / "data"), show_progress=False))
    words = ("--ranks", "2", "1", "--scaling", "weak", "--hardware", "cpu_laptop", "--predict-hosts", "2")
    done = study(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    first, second, planned = json.loads((tmp_path / "study/study.json").read_text())["rows"]
    assert [(row["num_ranks"], row["num_hosts"], row["global_batch_size"]) for row in (first, second, planned)] == [
        (1, 1, 256),
        (2, 1, 512),
        (4, 2, 1024),
    ]
    for row in (first, second):
        summary = json.loads((tmp_path / f"study/ranks_{row['num_ranks']:04d}/summary.json").read_text())
        assert (summary["world_size"], summary["num_steps"]) == (row["num_ranks"], 20)
        assert row["measured_samples_per_s"] == row["global_batch_size"] / summary["comparison"]["measured_step_s"]
        assert row["hardware"] == "cpu_laptop"
    assert planned["measured_step_s"] is None
    assert planned["predicted_samples_per_s"] == 1024 / planned["predicted_step_s"]

    again = study(tmp_path, *words[:-2])
    assert again.returncode == 0, again.stderr
    assert "papilio study: " not in again.stdout
    assert f"{second['measured_samples_per_s']:,.0f}" in again.stdout
    other = study(tmp_path, *words[:-4], "--seed=9")
    assert other.returncode == 2
    assert "holds another study, which differs in overrides; give a new folder" in other.stderr


def parse(folder: Path, *words: str) -> argparse.Namespace:
    verb = next(verb for verb in VERBS if verb.name == "study")
    return parse_arguments(verb, ["--recipe", "quickstart", "--output", str(folder), *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ranks", "0"), "--ranks 0: at least one is needed"),
        (("--predict-hosts", "0"), "--predict-hosts 0: at least one is needed"),
        (("--steps", "5"), "--steps 5: the first steps warm up, so at least 20 are needed"),
        (("--hardware", "dgx_h10"), "did you mean dgx_h100"),
    ],
)
def test_wrong_numbers_are_refused_before_any_job(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study_jobs.run_study(parse(tmp_path, *words))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="is not empty and holds no study; give a new folder"):
        study_jobs.run_study(parse(tmp_path))


def test_hosts_to_predict_need_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_jobs, "run_locally", lambda app: pytest.fail("no job is needed to see this"))
    with pytest.raises(UsageError, match="--predict-hosts needs to know the hosts: --hardware NAME"):
        study_jobs.run_study(parse(tmp_path / "s", "--predict-hosts", "2"))


def test_a_job_that_fails_ends_the_study_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_jobs, "run_locally", lambda app: 75)
    assert study_jobs.run_study(parse(tmp_path / "s", "--json")) == 75
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :])["rows"] == []


def test_a_plan_that_does_not_fit_is_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace = parse(tmp_path / "s", "--hardware", "big_basin_v100", "--predict-hosts", "1")
    said = "papilio plan: error: table t_a does not fit\n  a way out: use row_wise\n"
    planned = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(study_jobs.subprocess, "run", lambda command, **settings: planned)
    row = study_jobs._predict(namespace, study_jobs._check(namespace), 1)
    assert (row.num_ranks, row.predicted_step_s, row.note) == (8, None, "table t_a does not fit")


def tree_of(*rows: StudyRow, num_cores: int = 8) -> dict[str, Any]:
    settings = {"recipe": "r", "scaling": "strong", "steps": 200, "num_cores": num_cores}
    return {"settings": settings, "rows": [row.to_dict() for row in rows]}


def test_the_table_by_hand() -> None:
    rows = (
        StudyRow(1, 1, 1000, measured_step_s=0.1, predicted_step_s=0.08, hardware="h"),  # 10,000 and 12,500
        StudyRow(4, 1, 1000, measured_step_s=0.05, predicted_step_s=0.04, hardware="h"),  # 20,000 and 25,000
        StudyRow(16, 2, 1000, predicted_step_s=0.02, hardware="h"),  # 50,000
        StudyRow(32, 4, 1000, hardware="h", note="table t_a does not fit"),
    )
    lines = format_study(tree_of(*rows)).splitlines()
    assert [line.split() for line in lines[2:6]] == [
        ["1", "1", "1,000", "10,000", "100%", "12,500", "100%", "+25%"],
        ["4", "1", "1,000", "20,000", "50%", "25,000", "50%", "+25%"],
        ["16", "2", "1,000", "-", "-", "50,000", "25%", "-"],
        ["32", "4", "1,000", "-", "-", "-", "-", "-"],
    ]
    assert lines[6:] == ["  32 ranks on 4 host(s): table t_a does not fit", "predicted for h"]
    crowded = format_study(tree_of(*rows, num_cores=2)).splitlines()
    assert crowded[-1] == "more ranks than the 2 cores here take turns: no measure of scaling"
