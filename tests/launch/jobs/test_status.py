"""`papilio status` with the view of all ranks, of a job and of a run folder."""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torchx import specs

from papilio.launch import cli
from papilio.launch.jobs import status as status_jobs
from papilio.launch.jobs.first_error import ErrorWatch
from papilio.launch.local_run import LinePrinter
from papilio.launch.schedulers.runner import make_runner
from papilio.trainer.elastic.health.live_view import LiveView, RankView

Papilio = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def papilio(capsys: pytest.CaptureFixture[str]) -> Papilio:
    """The command with these words: status, output, errors."""

    def call(*words: str) -> tuple[int, str, str]:
        status = cli.main(words)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def write_view(folder: Path, **settings: object) -> None:
    """Leave what rank 0 of a run would, and what makes a folder a run folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    values = {"unix_s": time.time(), "interval_s": 2.0, "name": "small", "world_size": 1, "step": 40, "num_steps": 100}
    values |= {
        "epoch": 1,
        "num_epochs": 1,
        "epoch_share": 0.4,
        "ranks": (RankView(rank=0, host="n7", step=40, phase="training"),),
    }
    (folder / "live.json").write_text(LiveView(**{**values, **settings}).model_dump_json())


def run_job(script: str) -> str:
    role = specs.Role(
        "small", "", entrypoint="bash", args=["-c", script], resource=specs.Resource(cpu=1, gpu=0, memMB=9)
    )
    with make_runner() as runner:
        handle: str = runner.run(specs.AppDef("small", roles=[role]), "local_cwd")
        runner.wait(handle, wait_interval=0.05)
    return handle


def test_a_jobs_ranks_are_found_by_the_run_folder_that_it_printed(papilio: Papilio, tmp_path: Path) -> None:
    write_view(tmp_path / "run", state="done")
    handle = run_job("echo '[0]:run folder: old'; echo '[0]:run folder: run'; echo '[1]:run folder: other'")
    status, out, _ = papilio("status", handle)
    lines = out.splitlines()
    assert (status, lines[0]) == (0, f"{handle}  small  SUCCEEDED  (status 0)")
    assert re.match(r"small  done \d+ s ago  step 40 of 100", lines[3])
    assert any(line.split()[:4] == ["0", "n7", "40", "training"] for line in lines)
    tree = json.loads(papilio("status", "--json")[1])
    assert (tree["state"], tree["ranks"]["ranks"][0]["host"]) == ("SUCCEEDED", "n7")


def test_the_first_error_is_the_last_line(papilio: Papilio, tmp_path: Path) -> None:
    write_view(tmp_path / "run", state="failed", error="rank 1 (host n7) failed first: as rank 0 knew it")
    failure = "rank 1 (host n7) failed first, at step 40: KeyError: 'x' (trainer/loop.py:9, in f)"
    run_job(f"echo '[0]:run folder: run'; echo \"papilio: error: {failure}\"; exit 1")
    out = papilio("status")[1]
    assert out.splitlines()[-1] == f"  first error: {failure}"
    assert out.count("failed first") == 1


def test_a_job_that_was_killed_shows_what_was_last_seen(papilio: Papilio, tmp_path: Path) -> None:
    write_view(tmp_path / "run", unix_s=time.time() - 60)
    run_job("echo '[0]:run folder: run'; exit 9")
    assert re.search(r"^small  failed 1 min \d\d s ago  step 40 of 100", papilio("status")[1], re.MULTILINE)


def test_a_job_that_does_not_train_has_no_ranks(papilio: Papilio) -> None:
    run_job("echo preprocessing")
    assert papilio("status")[1].splitlines()[1].split() == ["host", "name", "state"]
    assert json.loads(papilio("status", "--json")[1])["ranks"] is None


def test_a_run_folder_is_shown_by_itself(papilio: Papilio, tmp_path: Path) -> None:
    write_view(tmp_path / "run", unix_s=time.time() - 60)
    assert re.match(r"small  old 1 min \d\d s ago  step 40 of 100", papilio("status", "run")[1])
    assert json.loads(papilio("status", "run", "--json")[1])["step"] == 40
    codes = []
    for settings in (
        {"unix_s": time.time() - 60},
        {},
        {"state": "done", "unix_s": time.time() - 60},
        {"state": "failed"},
    ):
        write_view(tmp_path / "run", **settings)
        codes.append((papilio("status", "run")[0], papilio("status", "run", "--json")[0]))
    assert codes == [(3, 3), (0, 0), (0, 0), (1, 1)]
    (tmp_path / "empty").mkdir()
    status, out, err = papilio("status", "empty")
    assert (status, out) == (3, "")
    assert err == "papilio status: error: empty is not a run folder; give the folder that training printed, or a job\n"


def test_watch_needs_a_terminal(papilio: Papilio) -> None:
    status, _, err = papilio("status", "--watch")
    assert status == 2
    assert "--watch draws on a terminal; elsewhere use papilio status --json, or papilio logs -f" in err


def test_watch_draws_over_what_was_drawn_until_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_view(tmp_path / "run")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(status_jobs.shutil, "get_terminal_size", lambda: os.terminal_size((80, 24)))
    monkeypatch.setattr(status_jobs.time, "sleep", lambda seconds: write_view(tmp_path / "run", state="done", step=100))
    assert cli.main(["status", "-w", "run"]) == 0
    first, second = capsys.readouterr().out.split("\x1b[H")[1:]
    assert "running\x1b[0m  step 40 of 100" in first
    assert re.search(r"done\x1b\[0m \d+ s ago  step 100 of 100", second)
    assert second.endswith("\x1b[J")


def test_the_first_error_is_that_after_the_last_restart() -> None:
    errors = ErrorWatch()
    for line in (
        "papilio: rank 0 (host a) failed first, at step 3: KeyError: 1; restarting, restart 1 of 3",
        "papilio: starting again on 2 ranks",
        "[1]:papilio train: error: shard x is missing",
    ):
        errors.take(line)
    assert errors.found == "shard x is missing"
    errors.take("papilio: error: rank 1 (host b) failed first, at step 1,200: DatasetError: shard x is missing")
    errors.take("papilio: error: rank 0 (host a) failed first: killed by SIGKILL")
    assert errors.found == "rank 1 (host b) failed first, at step 1,200: DatasetError: shard x is missing"


def test_what_a_rank_said_is_more_than_its_exit_status() -> None:
    errors = ErrorWatch()
    exited = "rank 0 (host a) failed first: exited with status 78; last heartbeat at step 0"
    errors.take(f"papilio: error: {exited}")
    assert errors.found == exited
    errors = ErrorWatch()
    errors.take("[0]:papilio train: error: runs/a is in use by job x (host a, pid 7): one job at a time trains there")
    errors.take(f"papilio: error: {exited}")
    assert errors.found == "runs/a is in use by job x (host a, pid 7): one job at a time trains there"


def test_native_stacks_are_left_out_of_what_is_shown() -> None:
    stream = io.StringIO()
    printer = LinePrinter(stream, None)
    for line in (
        "[0]:before",
        "host 1: [W1121 12:54:06.783356518 TCPStore.cpp:106] [c10d] sendBytes failed on SocketImpl: Broken pipe",
        "host 1: Exception raised from sendBytes at Utils.hpp:758 (most recent call first):",
        "host 1: frame #0: c10::Error::Error() + 0x9d",
        "host 1: <omitting python frames>",
        "host 1: ",
        "",
        "[1]:after",
    ):
        printer.print(line)
    assert stream.getvalue() == "before\n\nrank 1: after\n"
