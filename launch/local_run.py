"""Runs a TorchX application on this machine and shows what its ranks print."""

from __future__ import annotations

import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import TextIO

from torchx import specs
from torchx.runner import Runner
from torchx.schedulers.local_scheduler import SignalException, create_scheduler

PROGRESS_BAR = re.compile(r"\|[ ▏▎▍▌▋▊▉█]{4,}\|")
# "[1]:" is torchrun's; torch adds its own, "[rank1]: ", to tracebacks. In torchrun's report of a failure a line may be
# "[1]:" and nothing else.
RANK_PREFIX = re.compile(r"^\[(?:(0)\]:|(\d+)\]:(?=.))(?:\[rank\d+\]: ?)?")
TRACEBACK = "Traceback (most recent call last):"
ERASE_TO_END_OF_LINE = "\x1b[K"


class LinePrinter:
    """Prints a job's lines; on a terminal, a progress line is drawn over the progress line before it.

    Lines of rank 0 lose their prefixes; those of other ranks begin with "rank 3: ".
    """

    def __init__(self, stream: TextIO, num_columns: int | None) -> None:
        """`num_columns` is the terminal's width, None where there is no terminal."""
        self._stream = stream
        self._num_columns = num_columns
        self._in_progress_line = False

    def print(self, line: str) -> None:
        """Print one line, given without its newline."""
        line = RANK_PREFIX.sub(lambda match: "" if match[1] else f"rank {match[2]}: ", line)
        if self._num_columns is not None and PROGRESS_BAR.search(line):
            # A line that wraps cannot be drawn over.
            self._stream.write(f"\r{line[: self._num_columns - 1]}{ERASE_TO_END_OF_LINE}")
            self._in_progress_line = True
        else:
            self.end_progress()
            self._stream.write(line + "\n")
        self._stream.flush()

    def end_progress(self) -> None:
        """Leave the progress line as it stands, so that what follows begins on a line of its own."""
        if self._in_progress_line:
            self._stream.write("\n")
            self._stream.flush()
        self._in_progress_line = False


def run_locally(app: specs.AppDef) -> int:
    """Run `app` (one role, one node) under TorchX's local_cwd scheduler and print its output as it comes.

    On SIGINT and SIGTERM the ranks are ended first. After a failure the full logs of the ranks are kept.

    Returns:
        The exit status: 0 when the job succeeded, 1 when it failed, 128 + the number of the signal that ended it.
    """
    log_dir = tempfile.mkdtemp(prefix="papilio_logs_")
    printer = LinePrinter(sys.stdout, shutil.get_terminal_size().columns if sys.stdout.isatty() else None)
    try:
        with Runner("papilio", {"local_cwd": create_scheduler}) as runner:
            status = _follow(runner, app, log_dir, printer)
    except SignalException as stopped:  # raised by TorchX's handlers; leaving the Runner has ended the ranks
        printer.end_progress()
        print(f"papilio: stopped by {stopped.sigval.name}; all ranks were ended", file=sys.stderr)
        status = 128 + stopped.sigval
    if status == 1:
        print(f"papilio: the job failed; the log of each rank is under {log_dir}", file=sys.stderr)
    else:
        shutil.rmtree(log_dir, ignore_errors=True)
    return status


def _follow(runner: Runner, app: specs.AppDef, log_dir: str, printer: LinePrinter) -> int:
    try:
        handle = runner.run(app, "local_cwd", cfg={"log_dir": log_dir})
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
        lines = _whole_lines(runner.log_lines(handle, app.roles[0].name, should_tail=True))
        for line in _without_agent_traceback(lines):
            printer.print(line)
        printer.end_progress()
        final = runner.wait(handle, wait_interval=0.1)
        return 0 if final is not None and final.state == specs.AppState.SUCCEEDED else 1
    except SignalException:
        # An impatient second Ctrl-C must not cut off the ending of the ranks, which takes SHUTDOWN_TIMEOUT_S at most.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        raise


def _whole_lines(pieces: Iterable[str]) -> Iterator[str]:
    """Join what TorchX's log reader cut where its buffer ended, so that each item is a line, without its newline."""
    pending = ""
    for piece in pieces:
        pending += piece
        if pending.endswith("\n"):
            yield pending.rstrip("\r\n")
            pending = ""
    if pending:
        yield pending


def _without_agent_traceback(lines: Iterable[str]) -> Iterator[str]:
    """Leave out the traceback with which torchrun ends when a rank failed: the rank's own has been printed before.

    Any other traceback of torchrun itself passes, at the end.
    """
    held: list[str] = []
    for line in lines:
        if held or line == TRACEBACK:
            if RANK_PREFIX.match(line):
                yield line
            else:
                held.append(line)
        else:
            yield line
    if not any("ChildFailedError" in line for line in held):
        yield from held
