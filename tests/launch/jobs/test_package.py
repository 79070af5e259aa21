"""papilio export, and papilio package show and verify, as a user runs them."""

import json
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from papilio.data_pipeline.schema import TRANSFORM_VERSION
from papilio.launch import cli
from papilio.launch.jobs import package_text
from papilio.trainer.inference.package.format import PackageManifest, RowError, Source, TableEntry, read_package
from tests.support.datasets import write_dataset
from tests.support.trained_runs import write_run

REPOSITORY = Path(__file__).resolve().parents[3]


def run_papilio(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "papilio.launch.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120, check=False)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a run, its data, and a package of it: (folder, what the export said)."""
    folder = tmp_path_factory.mktemp("work")
    write_run(folder / "run", write_dataset(folder / "data"))
    options = ["--quantize", "int4", "--table", "t_a=fp16", "--min-auc-ratio", "0.5"]
    return folder, run_papilio("export", "--run", "run", "--output", "package", *options, cwd=folder)


def test_export_says_what_it_made_and_measured(work):
    folder, done = work
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("package: ")
    assert " of step_0000000007-abcdef in " in lines[0]
    # 30 x 16 bytes of fp16; 28 x 8 bytes of int4, of 58 x 32.
    assert lines[1] == "  3 tables (2 in int4, 1 in fp16): 704 B, 37.9% of their size in fp32"
    assert lines[2] == "  package/report.html shows what was measured, and what each table costs at each precision"
    assert "certified on 60 samples of split test: AUC " in done.stderr
    left = {path.name for path in folder.iterdir()} - {"uncertified"}  # of another test, if that came first
    assert left == {"data", "package", "run"}


def test_show_tells_everything_of_a_package(work, capsys):
    folder, _ = work
    assert cli.main(["package", "show", str(folder / "package")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "model small, dlrm",
        "from run, step_0000000007-abcdef, step 7",
        f"data {folder}/data, transform version {TRANSFORM_VERSION}",
        "inputs 3 dense, 3 categorical",
        "held-out samples; at least 50.0000% of the AUC was asked for; report.html shows all",
        "tables 704 B (37.9% of fp32), dense part ",
        "formats none built yet",
        "t_a 30 8 sum fp16 480 B 50.0% 0.0",
        "t_b 11 8 sum int4 least_squares 88 B 25.0% ",
        "all 58 704 B 37.9%",
    ):
        assert part in out


def test_show_as_json_is_the_manifest(work, capsys):
    folder, _ = work
    assert cli.main(["package", "show", str(folder / "package"), "--json"]) == 0
    manifest = PackageManifest.model_validate(json.loads(capsys.readouterr().out))
    assert manifest == read_package(str(folder / "package")).manifest


def test_verify_reads_every_byte(work, tmp_path, capsys):
    import shutil

    package = tmp_path / "package"
    shutil.copytree(work[0] / "package", package)
    assert cli.main(["package", "verify", str(package)]) == 0
    assert capsys.readouterr().out.startswith(f"{package}  sound: ")
    raw = bytearray((package / "tables.bin").read_bytes())
    raw[400] ^= 1
    (package / "tables.bin").write_bytes(raw)
    (package / "schema.json").unlink()
    assert cli.main(["package", "verify", str(package)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"  {package}/tables.bin is damaged: its checksum is not what package.json says",
        f"  {package}/schema.json is missing",
    ]
    assert lines[2].startswith(f"{package}  DAMAGED: ") and "sound" not in lines[2]
    assert lines[2].endswith("nothing of it can be trusted: export it again, or copy it again from where it is whole")


@pytest.mark.parametrize("action", ["show", "verify"])
def test_what_is_no_package_is_said_in_one_line(tmp_path, action, capsys):
    assert cli.main(["package", action, str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        f"papilio package: error: {tmp_path} is not a package: it has no package.json; `papilio export"
    )
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quantize", "bf16"], "--quantize bf16: FBGEMM's lookups of bf16 tables end the process with SIGFPE"),
        (["--table", "t_a"], "--table t_a: write PATTERN=PRECISION"),
        (["--quantize", "auto"], "--quantize auto and --size-budget go together"),
    ],
)
def test_wrong_options_are_told_before_any_process_starts(words, message, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert cli.main(["export", "--run", "r", "--output", "o", *words]) == 2
    assert capsys.readouterr().err.startswith(f"papilio export: error: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "x", "--output", "new"], "x does not exist; did you mean run?"),
        (["--run", "package", "--output", "new"], "package is a package, not a run; `papilio package show package`"),
        (["--run", "run", "--output", "package"], "package is a package already; choose another folder, or remove it"),
        (["--run", "run", "--output", "new", "--checkpoint", "9"], "there is no checkpoint 9 in run/checkpoints"),
    ],
)
def test_what_an_export_cannot_do_is_one_line(work, words, message):
    done = run_papilio("export", *words, cwd=work[0])
    assert done.returncode == 1
    assert done.stderr.startswith("papilio export: error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def manifest_of(num_tables):
    tables = [
        TableEntry(
            name=f"t_{number}",
            feature=str(number),
            rows=100 + number,
            dim=16,
            pooling="sum",
            precision="int8" if number % 2 else "fp16",
            quantizer="minmax" if number % 2 else None,
            offset=0,
            row_bytes=20 if number % 2 else 32,
            row_error=RowError(),
        )
        for number in range(num_tables)
    ]
    return PackageManifest(
        papilio_version="1.2",
        transform_version=1,
        made_at="2026-01-01T00:00:00+00:00",
        name="small",
        architecture="dlrm",
        dense_features=(),
        tables=tables,
        source=Source(run="r", checkpoint="c", step=3, data="d"),
        versions={},
        files={},
    )


def test_of_many_tables_the_largest_are_listed():
    tables = manifest_of(40).tables
    lines = package_text.describe_tables(tables, 80, show_all=False)
    assert len(lines) == 1 + 12 + 2
    assert lines[-2].split()[:6] == ["28", "smaller", "8", "fp16,", "20", "int8"]
    assert lines[-1].split()[:2] == ["all", f"{sum(range(100, 140)):,}"]
    assert len(package_text.describe_tables(tables, 80, show_all=True)) == 1 + 40 + 1


def test_nothing_is_wider_than_the_terminal(work):
    package = read_package(str(work[0] / "package"))
    now = datetime.now(UTC) + timedelta(days=3)
    lines = package_text.describe(package, now, 80)
    assert any("(3 days ago)" in line for line in lines)
    assert max(map(len, lines[1:])) <= 80
    assert max(map(len, package_text.describe_tables(package.manifest.tables, 80, show_all=True))) <= 80


def test_a_package_without_a_gate_says_so(work):
    done = run_papilio("export", "--run", "run", "--output", "uncertified", "--no-gate", cwd=work[0])
    assert "  not certified (--no-gate): nobody has measured what it costs" in done.stdout
    lines = package_text.describe(read_package(str(work[0] / "uncertified")), datetime.now(UTC), 80)
    assert any("certified   no (--no-gate)" in line for line in lines)


def test_signals_to_end_are_passed_on():
    code = "import sys; from papilio.launch.child_process import run_module\n"
    code += "sys.exit(run_module('timeit', ['-n1', '-r1', 'import time; print(1, flush=True); time.sleep(60)']))"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    parent.stdout.readline()
    begin_s = time.monotonic()
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(30) == 128 + signal.SIGTERM
    assert time.monotonic() - begin_s < 30
    parent.stdout.close()
