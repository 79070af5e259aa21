"""The Makefile's environment, with a stand-in for python that makes a stand-in environment."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# What `python -m venv` would put at bin/python: it notes what pip is asked for, and fails where the test says so.
ENVIRONMENT_PYTHON = """#!/bin/sh
echo "$@" >> calls
if [ -e fail ] && echo "$@" | grep -q torchrec; then exit 1; fi
"""
PYTHON = """#!/bin/sh
case "$1" in
  launch/version_set.py) exec {python} "$@" ;;
  -m) mkdir -p "$3/bin"; touch "$3/pyvenv.cfg"; cp environment_python "$3/bin/python"; cp job "$3/bin/papilio"
      cp job "$3/bin/torchx" ;;
esac
"""
# Stands for papilio and torchx.
JOB = """#!/bin/sh
echo "$(basename "$0") $@" >> calls
if [ "$1" = generate ]; then mkdir -p datasets/quickstart; touch datasets/quickstart/manifest.json; fi
if [ "$3" = run ] && [ -e fail_job ]; then exit 3; fi
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("Makefile", "setup.cfg", "launch/version_set.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    for name, text in (("environment_python", ENVIRONMENT_PYTHON), ("job", JOB), ("python", PYTHON)):
        (tmp_path / name).write_text(text.replace("{python}", sys.executable))
        (tmp_path / name).chmod(0o755)
    return tmp_path


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "calls").write_text("")
    environment = {"PATH": "/usr/bin:/bin"}
    command = ["make", "PYTHON=./python", "DEVICE=cpu", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=60, check=False)


def calls(folder: Path) -> list[str]:
    return [line.removeprefix("-m pip install --quiet ") for line in (folder / "calls").read_text().splitlines()]


INSTALLATION = [
    "torch==2.13.0 fbgemm-gpu-cpu==1.8.0 tensordict>=0.8 torchmetrics==1.0.3",
    "--editable .[dev]",
    "--no-deps torchrec==1.8.0",
    "papilio doctor",
]


def test_the_environment_is_made_once(folder: Path) -> None:
    assert make(folder, "env").returncode == 0
    assert calls(folder) == INSTALLATION
    assert make(folder, "env").returncode == 0
    assert calls(folder) == []


def test_a_changed_setup_brings_the_environment_up_to_date(folder: Path) -> None:
    make(folder, "env")
    (folder / ".venv" / "kept").touch()
    with (folder / "setup.cfg").open("a") as file:
        file.write("# changed\n")
    make(folder, "env")
    assert calls(folder) == INSTALLATION
    assert (folder / ".venv" / "kept").exists()


@pytest.mark.parametrize("change", ["DEVICE=cuda", "TORCH=2.11.0"])
def test_another_device_or_version_set_gets_a_fresh_environment(folder: Path, change: str) -> None:
    make(folder, "env")
    (folder / ".venv" / "stale").touch()
    make(folder, "env", change)
    expected = "torch==2.13.0 fbgemm-gpu==1.8.0" if change == "DEVICE=cuda" else "torch==2.11.0 fbgemm-gpu-cpu==1.6.0"
    assert calls(folder)[0].startswith(expected)
    assert not (folder / ".venv" / "stale").exists()


def test_an_installation_that_was_cut_off_is_made_anew(folder: Path) -> None:
    (folder / "fail").touch()
    assert make(folder, "env").returncode != 0
    (folder / ".venv" / "stale").touch()
    (folder / "fail").unlink()
    assert make(folder, "env").returncode == 0
    assert calls(folder) == INSTALLATION
    assert not (folder / ".venv" / "stale").exists()


def test_an_environment_that_is_not_ours_is_not_removed(folder: Path) -> None:
    theirs = folder / "theirs"
    theirs.mkdir()
    (theirs / "pyvenv.cfg").touch()
    (folder / "fail").touch()
    for _ in range(2):
        assert make(folder, "env", "VENV=theirs").returncode != 0
    (theirs / "kept").touch()
    (folder / "fail").unlink()
    assert make(folder, "env", "VENV=theirs").returncode == 0
    assert make(folder, "env", "VENV=theirs", "TORCH=2.11.0").returncode == 0
    assert (theirs / "kept").exists()


def test_pip_arguments_reach_every_installation(folder: Path) -> None:
    make(folder, "env", "PIP_ARGS=--find-links wheels")
    assert [line.startswith("--find-links wheels ") for line in calls(folder)] == [True, True, True, False]


def test_train_makes_data_once_and_runs_the_component(folder: Path) -> None:
    component = "launch/components.py:train --recipe launch/recipes/quickstart.toml --nproc 2"
    generate = "papilio generate --shape criteo_small --rows 1000000 --output datasets/quickstart"
    job = f"torchx --log_level WARNING run -s local_cwd {component}"
    assert make(folder, "train").returncode == 0
    assert calls(folder) == [*INSTALLATION, generate, job]
    assert make(folder).returncode == 0
    assert calls(folder) == [job]


def test_train_fails_when_the_job_fails(folder: Path) -> None:
    (folder / "fail_job").touch()
    assert make(folder, "train").returncode != 0


def test_an_old_python_is_refused_by_name(folder: Path) -> None:
    (folder / "python").write_text("#!/bin/sh\nexit 1\n")
    done = make(folder, "test")
    assert done.returncode != 0
    assert (
        "make: ./python is not Python 3.11 or newer; name one that is: make PYTHON=/path/to/python3.12 test"
        in done.stderr
    )
    assert not (folder / ".venv").exists()


def test_a_python_without_venv_says_what_to_install(folder: Path) -> None:
    (folder / "python").write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1 ;; esac\n')
    done = make(folder, "env")
    assert done.returncode != 0
    assert "apt-get install python3-venv" in done.stderr
