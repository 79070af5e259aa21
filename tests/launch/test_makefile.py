"""The Makefile's environment, with a stand-in for python that makes a stand-in environment."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# Notes the words that a program got, each by itself: one that the shell split or joined is another word.
NOTE = """#!/bin/sh
note() { for word; do printf '%s\\037' "$word"; done >> calls; echo >> calls; }
"""
# What `python -m venv` would put at bin/python: it notes what pip is asked for, and fails where the test says so.
ENVIRONMENT_PYTHON = (
    NOTE
    + """note "$@"
if [ -e fail ] && echo "$@" | grep -q "$(cat fail)"; then exit 4; fi
"""
)
PYTHON = """#!/bin/sh
case "$1" in
  launch/version_set.py) exec {python} "$@" ;;
  -m) [ "$2" = venv ] || exit 1
      mkdir -p "$3/bin"; touch "$3/pyvenv.cfg"; cp environment_python "$3/bin/python"
      for name in papilio torchx ruff mypy shellcheck; do cp job "$3/bin/$name"; done ;;
esac
"""
# Stands for papilio, torchx and the linters.
JOB = (
    NOTE
    + """note "$(basename "$0")" "$@"
if [ "$1" = generate ]; then mkdir -p datasets/quickstart; touch datasets/quickstart/manifest.json; fi
if [ -e fail_job ] && echo "$(basename "$0") $@" | grep -q "$(cat fail_job)"; then exit 3; fi
"""
)


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
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def calls(folder: Path) -> list[str]:
    """What the programs of the environment were asked for, as one would write it in a shell."""
    lines = [shlex.join(line.split("\x1f")[:-1]) for line in (folder / "calls").read_text().split("\n")[:-1]]
    return [line.removeprefix("-m pip install --quiet ") for line in lines]


INSTALLATION = [
    "torch==2.13.0 fbgemm-gpu-cpu==1.8.0 'tensordict>=0.8' torchmetrics==1.0.3",
    "--editable '.[dev]'",
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
    assert calls(folder)[0] == f"{expected} 'tensordict>=0.8' torchmetrics==1.0.3"
    assert not (folder / ".venv" / "stale").exists()


def test_an_installation_that_was_cut_off_is_made_anew(folder: Path) -> None:
    (folder / "fail").write_text("torchrec")
    done = make(folder, "env")
    assert (done.returncode, calls(folder)) == (2, INSTALLATION[:3]), "make's status, and nothing after what failed"
    (folder / ".venv" / "stale").touch()
    (folder / "fail").unlink()
    assert make(folder, "env").returncode == 0
    assert calls(folder) == INSTALLATION
    assert not (folder / ".venv" / "stale").exists()


def test_an_environment_that_is_not_ours_is_not_removed(folder: Path) -> None:
    theirs = folder / "theirs"
    theirs.mkdir()
    (theirs / "pyvenv.cfg").touch()
    (folder / "fail").write_text("torchrec")
    for _ in range(2):
        assert make(folder, "env", "VENV=theirs").returncode == 2
        assert calls(folder)[-1] == INSTALLATION[2]
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
    (folder / "fail_job").write_text("torchx")
    done = make(folder, "train")
    assert done.returncode == 2
    assert "[Makefile:" in done.stderr and "train] Error 3" in done.stderr


PYTEST = "-m pytest -n 2 --dist loadfile --no-loadscope-reorder"


def test_test_runs_the_suite_in_the_environment_with_the_given_arguments(folder: Path) -> None:
    assert make(folder, "test").returncode == 0
    assert calls(folder) == [*INSTALLATION, PYTEST]
    assert make(folder, "test", "TEST_WORKERS=5", "PYTEST_ARGS=-k 'a or b' tests/x.py").returncode == 0
    assert calls(folder) == [PYTEST.replace("2", "5") + " -k 'a or b' tests/x.py"]
    (folder / "fail").write_text("pytest")
    assert make(folder, "test").returncode == 2


def test_lint_runs_all_four_and_stops_at_the_first_that_complains(folder: Path) -> None:
    scripts = "launch/schedulers/slurm/job.sh launch/schedulers/slurm/host.sh"
    tools = ["ruff check .", "ruff format --check .", "mypy", f"shellcheck {scripts}"]
    assert make(folder, "lint").returncode == 0
    assert calls(folder) == [*INSTALLATION, *tools]
    for count, tool in enumerate(tools, 1):
        (folder / "fail_job").write_text(tool)
        assert make(folder, "lint").returncode == 2
        assert calls(folder) == tools[:count]


def test_the_gpu_lane_says_that_it_needs_a_gpu_where_there_is_none(folder: Path) -> None:
    done = make(folder, "test-gpu")
    assert (done.returncode, calls(folder)) == (0, [])
    assert re.fullmatch(r"make: test-gpu needs a GPU: .*, so nothing was tested .*\n", done.stdout)
    assert not (folder / ".venv").exists(), "no environment is made for nothing"


def test_the_gpu_lane_runs_the_tests_of_the_gpu(folder: Path) -> None:
    assert make(folder, "test-gpu", "DEVICE=cuda", "PYTEST_ARGS=-x").returncode == 0
    assert calls(folder)[-1] == "-m pytest -m gpu -rs -x"
    (folder / "fail").write_text("pytest")
    assert make(folder, "test-gpu", "DEVICE=cuda").returncode == 2


def test_every_command_that_the_makefile_explains_is_there(folder: Path) -> None:
    text = (folder / "Makefile").read_text()
    explained = set(re.findall(r"\bmake ([a-z-]+)(?: {2,}|$)", text.split("# Settings")[0], re.MULTILINE))
    assert explained == {"train", "test", "test-gpu", "lint", "docs", "data", "env"}
    for target in explained:
        assert make(folder, "-n", target).returncode == 0, target


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
