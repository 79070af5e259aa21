"""Whatever a path leads to, every verb says in one line what is wrong, and starts nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.bad_paths import RANKS_STARTED

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int, str]]:
    folder = tmp_path_factory.mktemp("tries")
    environment = {**os.environ, "XDG_STATE_HOME": str(folder / "state"), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.support.bad_paths", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_there_is_something_to_check(results: list[tuple[str, int, str]]) -> None:
    assert len(results) > 400
    assert {what.split()[0] for what, _, _ in results} >= {
        "preprocess",
        "train",
        "plan",
        "evaluate",
        "predict",
        "serve",
    }


def test_every_try_is_refused_in_one_line(results: list[tuple[str, int, str]]) -> None:
    wrong = []
    for what, status, printed in results:
        # `package verify` is a report, with its verdict at the end.
        word = "damaged:" if "  DAMAGED: " in printed else "error"
        errors = [line for line in printed.splitlines() if word in line.lower()]
        # Of `status`, 3 says that nothing is known of a job, since 1 is a job that failed.
        is_refused = (
            status in (1, 2, 78, *([3] if what.startswith("status") else []))
            and len(errors) == 1
            and len(errors[0]) < 2_000
        )
        if "Traceback" in printed or "internal error" in printed or not is_refused:
            wrong.append((what, status, printed[-300:]))
    assert wrong == []


def test_nothing_is_started(results: list[tuple[str, int, str]]) -> None:
    assert [what for what, status, _ in results if status == RANKS_STARTED] == []
