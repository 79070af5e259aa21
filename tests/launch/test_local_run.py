import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from papilio.launch.local_run import LinePrinter, _make_log_dir, _whole_lines

REPOSITORY = Path(__file__).resolve().parents[2]
# Ranks run this instead of a training job.
STAND_IN_JOB = """
import os, signal, sys, time
from pathlib import Path
rank = os.environ["RANK"]
print(f"rank {rank} of {os.environ['WORLD_SIZE']} has {os.environ['OMP_NUM_THREADS']} thread", flush=True)
if "--save=1" in sys.argv:
    signal.signal(signal.SIGTERM, lambda number, frame: (time.sleep(7), print("saved", flush=True), sys.exit(75)))
if "--fail=1" in sys.argv and rank == "1":
    sys.exit("this rank fails on purpose")
if "--refuse=1" in sys.argv:
    sys.exit(78)
if "--hang=1" in sys.argv or "--save=1" in sys.argv:
    time.sleep(1)  # no real rank is up before its agent knows it, which is what gives a rank its time to save
    Path(f"pid_{rank}").write_text(str(os.getpid()))
    time.sleep(300)
"""
DRIVER = """
import sys
from papilio.launch import components
from papilio.launch.local_run import run_locally
app = components.train(*sys.argv[1:], recipe="r", nproc=2)
words = app.roles[0].args
words[words.index("papilio.trainer.train")] = "stand_in"
sys.exit(run_locally(app))
"""


@pytest.fixture
def job_folder(tmp_path: Path) -> Path:
    (tmp_path / "stand_in.py").write_text(STAND_IN_JOB)
    (tmp_path / "tmp").mkdir()
    return tmp_path


def start_job(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{folder}", "TMPDIR": str(folder / "tmp")}
    command = [sys.executable, "-c", DRIVER, *overrides]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def test_output_of_all_ranks_is_shown_and_success_is_status_0(job_folder: Path) -> None:
    out, err = start_job(job_folder).communicate(timeout=120)
    assert sorted(out.splitlines()) == ["rank 0 of 2 has 1 thread", "rank 1: rank 1 of 2 has 1 thread"], err
    assert list((job_folder / "tmp").glob("papilio_logs_*")) == []


def test_a_failing_rank_is_status_1_and_its_log_is_kept(job_folder: Path) -> None:
    job = start_job(job_folder, "--fail=1")
    out, err = job.communicate(timeout=120)
    assert job.returncode == 1
    assert "rank 1: this rank fails on purpose" in out.splitlines()
    assert "ChildFailedError" not in out
    (log_dir,) = (job_folder / "tmp").glob("papilio_logs_*")
    assert f"papilio: the job failed; the log of each rank is under {log_dir}" in err
    assert err.splitlines()[-1].startswith("papilio: first error: rank 1 (host "), "the last thing that is said"
    assert any("on purpose" in path.read_text() for path in log_dir.rglob("stderr.log"))


def test_a_mistake_that_would_be_made_again_is_status_78(job_folder: Path) -> None:
    job = start_job(job_folder, "--refuse=1")
    _, err = job.communicate(timeout=120)
    assert job.returncode == 78
    assert "papilio: the job failed; the log of each rank is under" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_ranks(job_folder: Path, number: signal.Signals) -> None:
    job = start_job(job_folder, "--hang=1")
    pid_files = [job_folder / "pid_0", job_folder / "pid_1"]
    wait_for(lambda: all(path.exists() and path.read_text() for path in pid_files), "both ranks")
    job.send_signal(number)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 128 + number
    assert f"papilio: stopped by {number.name}; all ranks were ended" in err
    wait_for(lambda: not any(is_alive(int(path.read_text())) for path in pid_files), "the end of both ranks")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_ranks_that_save_get_the_time_to(job_folder: Path, number: signal.Signals, status: int) -> None:
    """Seven seconds are more than ranks without anything to save get; ten, and TorchX would kill the agent."""
    job = start_job(job_folder, "--save=1")
    pid_files = [job_folder / "pid_0", job_folder / "pid_1"]
    wait_for(lambda: all(path.exists() and path.read_text() for path in pid_files), "both ranks")
    job.send_signal(number)
    out, err = job.communicate(timeout=60)
    assert job.returncode == status, err
    assert sorted(out.splitlines())[-2:] == ["rank 1: saved", "saved"], out
    assert f"papilio: stopped by {number.name}; the run was saved before" in err


def test_a_killed_agent_is_reported(job_folder: Path) -> None:
    job = start_job(job_folder, "--hang=1")
    pid_files = [job_folder / "pid_0", job_folder / "pid_1"]
    wait_for(lambda: all(path.exists() and path.read_text() for path in pid_files), "both ranks")
    (agent,) = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(agent), signal.SIGKILL)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "papilio: the agent of the ranks was killed by SIGKILL" in err
    wait_for(lambda: not any(is_alive(int(path.read_text())) for path in pid_files), "the end of both ranks")


@pytest.mark.parametrize("moment", ["agent starts", "ranks start", "ranks run"])
def test_nothing_outlives_a_killed_command(job_folder: Path, moment: str) -> None:
    """SIGKILL leaves the command no time to end anything."""
    job = start_job(job_folder, "--hang=1")
    wait_for(lambda: descendants(job.pid), "the agent")
    if moment != "agent starts":
        wait_for(lambda: len(descendants(job.pid)) > 1, "a rank")
    if moment == "ranks run":
        wait_for(lambda: (job_folder / "pid_1").exists() and (job_folder / "pid_0").exists(), "both ranks")
    started = descendants(job.pid)
    job.kill()
    job.communicate()
    wait_for(lambda: not any(map(is_alive, started)) and not alive_in(job_folder), "the end of all")


def test_folders_of_logs_that_killed_commands_left_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("papilio_logs_kept", "papilio_logs_left", "another_left"):
        (tmp_path / name).mkdir()
    for name in ("papilio_logs_left", "another_left"):
        (tmp_path / name / "running.lock").touch()
    first, _ = _make_log_dir()
    second, _ = _make_log_dir()
    assert {path.name for path in tmp_path.iterdir()} == {
        "papilio_logs_kept",
        "another_left",
        Path(first).name,
        Path(second).name,
    }


def descendants(pid: int) -> list[int]:
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return [*children, *(found for child in children for found in descendants(child))]


def alive_in(folder: Path) -> list[int]:
    """Processes whose working directory is this folder, whoever started them."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "cwd").readlink() == folder and is_alive(int(path.name)):
                found.append(int(path.name))
    return found


def printed(lines: list[str], num_columns: int | None) -> str:
    stream = io.StringIO()
    printer = LinePrinter(stream, num_columns)
    for line in lines:
        printer.print(line)
    printer.end_progress()
    return stream.getvalue()


PROGRESS = ["[0]:start", "[0]:|██      | 25 %", "[0]:|████████| 100 %", "[3]:done"]


def test_progress_lines_are_drawn_over_on_a_terminal() -> None:
    expected = "start\n\r|██      | 25 %\x1b[K\r|████████| 100 %\x1b[K\nrank 3: done\n"
    assert printed(PROGRESS, num_columns=80) == expected


def test_progress_lines_are_plain_in_a_log() -> None:
    assert printed(PROGRESS, num_columns=None) == "start\n|██      | 25 %\n|████████| 100 %\nrank 3: done\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[0]:[rank0]: RuntimeError: x", "RuntimeError: x"),
        ("[2]:[rank2]:   File", "rank 2:   File"),
        ("[0]:", ""),
        ("[2]:", "[2]:"),
        ("W1121 agent", "W1121 agent"),
    ],
)
def test_prefixes_of_ranks(line: str, expected: str) -> None:
    assert printed([line], num_columns=None) == expected + "\n"


PARTS = {
    "bar": "train      |█████████▌          |  48%",
    "step": "step 12,000/25,000",
    "loss": "logloss 0.4512 (train)",
    "rate": "123,456 samples/s",
    "wait": "data wait 10.0%",
    "left": "3 min 05 s left",
}


@pytest.mark.parametrize(
    ("num_columns", "shown"),
    [
        (151, ["bar", "step", "loss", "rate", "wait", "left"]),
        (125, ["step", "loss", "rate", "wait", "left"]),
        (81, ["step", "rate", "left"]),
        (61, ["rate", "left"]),
    ],
)
def test_a_progress_line_fits_the_terminal(num_columns: int, shown: list[str]) -> None:
    """Its bar shrinks, then the least important goes: how fast it is and how long it takes stay."""
    text = printed(["[0]:" + "  ".join(PARTS.values())], num_columns).removeprefix("\r").removesuffix("\x1b[K\n")
    assert len(text) < num_columns
    assert [name for name, part in PARTS.items() if part in text] == shown
    bar = text.split("|")[1]
    assert len(bar) >= 6
    assert abs(len(bar.strip()) - 0.48 * len(bar)) <= 1


def test_tables_are_not_taken_for_progress() -> None:
    assert printed(["| a | b |", "|---|---|"], num_columns=80) == "| a | b |\n|---|---|\n"


def test_lines_cut_by_the_reader_are_joined() -> None:
    assert list(_whole_lines(["a\n", "b", "c\n", "\n", "d"])) == ["a", "bc", "", "d"]
