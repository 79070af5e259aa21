"""Where modules come from, and how long a process lives, whatever lies in the working directory."""

import getpass
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from papilio.trainer.elastic import bootstrap
from tests.support.agents import is_alive, wait_until

REPOSITORY = Path(__file__).resolve().parents[3]
ORIGINS = "import papilio.launch, numpy, papilio.trainer.config; print(papilio, numpy, papilio.trainer, sep='\\n')"
CONSOLE_SCRIPT = "import sys\nfrom papilio.launch.command import main\nsys.exit(main())\n"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder full of modules that say so when they are imported."""
    for name in ("trainer", "sharding", "data_pipeline", "numpy", "pydantic", "random", "socket"):
        (tmp_path / f"{name}.py").write_text(f"print('{name} of the folder'); raise ImportError('{name}')\n")
    for name in ("launch", "benchmarks", "torchx"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"print('{name} of the folder'); raise ImportError('{name}')\n")
    return tmp_path


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("python_path", ["", ".", "HOSTILE", ":"])
def test_a_module_is_taken_from_the_install(hostile: Path, python_path: str) -> None:
    for name in ("random.py", "socket.py"):  # of PYTHONPATH, even Python itself would take these
        (hostile / name).unlink() if python_path else None
    command = bootstrap.module_command("tests.support.statement", ORIGINS)
    python_path = python_path.replace("HOSTILE", str(hostile))
    done = run(command, hostile, PYTHONPATH=f"{REPOSITORY}:{python_path}")
    assert done.returncode == 0, done.stderr
    assert "of the folder" not in done.stdout
    for name, line in zip(("papilio", "numpy", "papilio/trainer"), done.stdout.splitlines(), strict=True):
        place = bootstrap.HOME if name != "numpy" else sysconfig.get_path("platlib")
        assert f"from '{place}/{name}/" in line


def test_what_python_starts_by_itself_does_not_look_into_the_working_directory(hostile: Path) -> None:
    """So multiprocessing starts its workers: with -c, before which Python puts the working directory."""
    start = "import subprocess, sys; print(subprocess.run([sys.executable, '-c', 'import random']).returncode)"
    done = run(bootstrap.module_command("tests.support.statement", start), hostile, PYTHONPATH=str(REPOSITORY))
    assert done.stdout.splitlines()[0] == "0", done.stderr


def test_the_command_is_ours_whatever_pythonpath_has(hostile: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/papilio").write_text(CONSOLE_SCRIPT)
    command = [sys.executable, str(tmp_path / "bin/papilio"), "preflight", "--recipe", "quickstart", "--nnodes", "0"]
    for name in ("random.py", "socket.py"):
        (hostile / name).unlink()
    done = run(command, hostile, PYTHONPATH=f"{hostile}:{REPOSITORY}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "papilio preflight: error: --nnodes 0: a number from 1 to 64 is needed" in done.stderr


def test_pythonpath_adds_modules_but_replaces_none(tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text("print('found')\n")
    done = run(bootstrap.module_command("only_here", "a"), tmp_path, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "found\n"), done.stderr


def test_the_order_of_the_path() -> None:
    lib, site = "/lib/python3.11", "/lib/python3.11/site-packages"
    assert bootstrap.arranged(["/p", "/q", lib, site, "/home"], "/p:/q", "/home") == [lib, "/home", site, "/p", "/q"]
    assert bootstrap.arranged(["/p", lib, site], "/p", site) == [lib, site, "/p"]
    assert bootstrap.arranged(["/home", lib, site], "/home", "/home") == [lib, "/home", site], "PYTHONPATH=home"


def test_a_user_without_an_entry_has_a_name_and_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    bootstrap.name_user()
    assert "USER" not in os.environ, "who has an entry needs nothing"
    for name in ("USER", "HOME"):
        monkeypatch.setenv(name, "")  # so that what is set below is taken back, also where there was none
        monkeypatch.delenv(name)
    monkeypatch.setattr("os.getuid", lambda: 54_321)
    bootstrap.name_user()
    assert (getpass.getuser(), Path.home()) == ("uid_54321", Path("/"))


def test_a_process_whose_parent_has_gone_before_it_looked_ends() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    command = [
        sys.executable,
        bootstrap.FILE,
        f"--parent={gone.pid}:9",
        "-m",
        "tests.support.statement",
        "print('ran')",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (137, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_gets_its_signal_when_its_parent_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    """The child says which signal came, where it can."""
    child = (
        "import os, signal, sys; "
        "signal.signal(15, lambda *_: (open('told', 'w').close(), sys.exit())); "
        "open(f'pid_{os.getpid()}', 'w').close(); signal.pause(); signal.pause()"
    )
    parent = (
        "import subprocess, time; from papilio.trainer.elastic.bootstrap import bound, module_command; "
        f"subprocess.Popen(bound(module_command('tests.support.statement', {child!r}), {int(number)})); time.sleep(300)"
    )
    command = bootstrap.module_command("tests.support.statement", parent)
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    wait_until(lambda: bool(list(tmp_path.glob("pid_*"))), "the child")
    (pid,) = (int(path.name.removeprefix("pid_")) for path in tmp_path.glob("pid_*"))
    process.kill()
    process.wait()
    wait_until(lambda: not is_alive(pid), "the end of the child")
    assert (tmp_path / "told").exists() == (number == signal.SIGTERM)
