import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from papilio.launch import cli
from papilio.launch.verb_arguments import serve_arguments
from papilio.trainer.inference.backends.format_folder import BackendFigures, Choice, Made, write_format
from papilio.trainer.inference.package.format import read_package
from papilio.trainer.inference.serving.serve_options import ServeOptions
from tests.support.served import json_body, records_of, text_rows, write_package


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> str:
    return write_package(tmp_path_factory.mktemp("package") / "shop", 0)


def test_predict_scores_raw_files(package, tmp_path, capfd) -> None:
    (tmp_path / "in.csv").write_text("\n".join(text_rows(records_of(0, 25), label=False)) + "\n")
    words = ["--package", package, "--input", f"{tmp_path}/in.csv", "--source", "table"]
    assert cli.main(["predict", *words, "--output", f"{tmp_path}/out/s.parquet"]) == 0
    assert capfd.readouterr().out.startswith(f"{tmp_path}/out/s.parquet: 25 rows in ")
    assert pq.read_table(tmp_path / "out" / "s.parquet").num_rows == 25


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "--output", "s.parquet"], "give either --data, a data set, or --input, raw files"),
        (["predict", "--output", "s.csv", "--data", "d"], "--output s.csv must end in .parquet"),
        (["predict", "--output", "s.parquet", "--input", "a"], "--input goes with --source criteo or --source table"),
        (["predict", "--output", "s.parquet", "--data", "nowhere"], "--data nowhere does not exist"),
        (["serve", "--port", "70000"], "--port 70000: Input should be less than 65536"),
        (["predict", "--output", "s.parquet", "--data", "d", "--trust-formats"], "--trust-formats goes with --fastest"),
        (["serve", "--exact", "--trust-formats"], "--exact uses no format, so there is none to trust"),
        (["serve", "--max-batch", "9999"], "max_queue (4096) must be at least max_batch (9999)"),
    ],
)
def test_wrong_options_are_told_before_anything_starts(package, words, message, capsys) -> None:
    assert cli.main([*words, "--package", package]) == 2
    assert message in capsys.readouterr().err


def test_every_limit_of_the_server_has_its_flag() -> None:
    parser = argparse.ArgumentParser()
    serve_arguments(parser)
    fields = {action.dest for action in parser._actions if action.dest != "help"}
    assert fields == set(ServeOptions.model_fields)


@pytest.mark.parametrize("words", [["serve"], ["predict", "--data", "d", "--output", "s.parquet"]])
def test_what_is_no_package_is_told_before_anything_starts(words, tmp_path, capsys) -> None:
    assert cli.main([*words, "--package", f"{tmp_path}/none"]) == 1
    assert f"{tmp_path}/none does not exist; `papilio export --run RUN_DIR" in capsys.readouterr().err


def test_a_format_that_is_not_there_or_not_ours_is_told_before_anything_starts(
    package, tmp_path, capsys, monkeypatch
) -> None:
    copy = str(shutil.copytree(package, tmp_path / "package"))
    words = ["predict", "--package", copy, "--data", str(tmp_path), "--output", "s.parquet", "--fastest"]
    monkeypatch.setattr(subprocess, "Popen", None)
    assert cli.main(words) == 1
    assert f"{copy} has no format fastest; `papilio package build {copy} --format fastest` makes it" in (
        capsys.readouterr().err
    )
    figures = BackendFigures(dense="fp32")
    choice = Choice(
        up_to=((1, "eager"),), ways={"eager": figures}, num_threads=1, num_samples=0, min_auc_ratio=0.9, held_out=None
    )
    write_format(read_package(copy), "fastest", lambda folder: Made({}, choice=choice))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of_another_user"))
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert "was not built by this user on this machine" in error and error.count("\n") == 1


def test_serve_becomes_the_server(package, tmp_path) -> None:
    log = tmp_path / "log"
    command = [
        sys.executable,
        "-m",
        "papilio.launch.cli",
        "serve",
        "--package",
        package,
        "--port",
        "0",
        "--drain-s",
        "0",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    with log.open("wb") as file:
        server = subprocess.Popen(command, stderr=file, env=environment)
    deadline = time.monotonic() + 60
    while f"by process {server.pid}\n" not in log.read_text():
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    address = log.read_text().split(" is served on ")[1].split()[0]
    request = urllib.request.Request(
        f"{address}/predict", json_body(records_of(0, 2)), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        assert len(json.loads(response.read())["probabilities"]) == 2
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0, log.read_text()
