"""What is shown where characters, colors, a terminal, or a reader are missing."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from papilio.data_pipeline import terminal
from papilio.data_pipeline.terminal import format_duration
from papilio.trainer.elastic.bootstrap import module_command

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = "|█▌ | ── 2 \u00d7 3 → 6 é …"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "|## | -- 2 x 3 -> 6 ? ..."),
        ({"PYTHONIOENCODING": "latin-1"}, "|## | -- 2 \u00d7 3 -> 6 é ..."),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "|## | -- 2 x 3 -> 6 ? ..."),
        ({"PYTHONIOENCODING": "utf-8"}, TEXT),
    ],
)
def test_characters_that_a_stream_does_not_have_are_replaced(settings: dict[str, str], expected: str) -> None:
    command = module_command(
        "tests.support.statement", f"import sys; print({TEXT!a}); print('\\udcff', file=sys.stderr)"
    )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHONIO", "PYTHONUTF8", "LC_"))
    }
    done = subprocess.run(command, env=environment | settings, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    encoding = settings.get("PYTHONIOENCODING", "ascii")
    assert done.stdout.decode(encoding) == expected + "\n"
    assert done.stderr == b"?\n"


def test_a_reader_that_goes_ends_a_process_without_a_traceback() -> None:
    for words in (["-m", "papilio.launch.cli", "--help"], [*module_command("papilio.launch.cli", "--help")[1:]]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, *words], cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, b"")


def test_another_pipe_that_breaks_is_no_reader_that_goes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, terminal.ends_quietly():
        raise BrokenPipeError(32, "Broken pipe")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "papilio: error: Broken pipe\n"


def test_a_job_whose_output_is_a_log_shows_the_traceback() -> None:
    with pytest.raises(KeyError), terminal.ends_quietly(shows_traceback=True):
        raise KeyError("t_3")


def test_a_full_disk_under_stdout_is_told_in_one_line() -> None:
    for words in (["-m", "papilio.launch.cli", "--help"], [*module_command("papilio.launch.cli", "--help")[1:]]):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, *words], cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False
            )
        told = b"papilio: error: stdout cannot be written: No space left on device; lead it elsewhere\n"
        assert (done.returncode, done.stderr) == (1, told)


def test_what_a_full_disk_does_not_take_ends_no_training() -> None:
    code = "from data_pipeline import terminal as t; t.drop_what_has_no_room(); print('lost' * 9000, flush=True)"
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_disk_under_another_file_is_not_said_to_be_stdouts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, terminal.ends_quietly():
        raise OSError(errno.ENOSPC, "No space left on device", "/data/x")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "papilio: error: No space left on device: /data/x\n"


def test_ctrl_c_ends_a_process_with_its_status() -> None:
    with pytest.raises(SystemExit) as ended, terminal.ends_quietly():
        raise KeyboardInterrupt
    assert ended.value.code == 130


@pytest.mark.parametrize(
    ("settings", "draws", "colors"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
        ({"TERM": "dumb"}, False, False),
        ({}, False, False),
    ],
)
def test_colors_and_drawing_follow_the_environment(
    settings: dict[str, str], draws: bool, colors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert (terminal.can_draw_over(Screen()), terminal.has_colors(Screen())) == (draws, colors)
    assert not terminal.can_draw_over(io.StringIO())


def test_columns_come_before_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "61")
    assert terminal.num_columns(Screen()) == 61
    assert terminal.num_columns(io.StringIO()) is None
    assert terminal.table_columns() == 80
    monkeypatch.setenv("COLUMNS", "123")
    assert terminal.table_columns() == 123


def test_durations_are_written_in_their_two_largest_units() -> None:
    written = [format_duration(seconds) for seconds in (0.4, 12, 59.6, 185, 7_620)]
    assert written == ["0 s", "12 s", "1 min 00 s", "3 min 05 s", "2 h 07 min"]
    assert format_duration(1.26, decimals=1) == "1.3 s"
