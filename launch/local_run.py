"""Runs a TorchX application on this machine and shows what its ranks print."""

from __future__ import annotations

import contextlib
import fcntl
import locale
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from torchx import specs
from torchx.runner import Runner
from torchx.schedulers.local_scheduler import CWDImageProvider, LocalScheduler

from papilio.data_pipeline.terminal import can_draw_over, num_columns
from papilio.launch.jobs.first_error import ErrorWatch
from papilio.trainer.elastic.bootstrap import bound
from papilio.trainer.elastic.exit_codes import NO_RESTART_EXIT_CODE, RESUME_EXIT_CODE
from papilio.trainer.run.progress_lines import PROGRESS_BAR, fit_progress_line

# "[1]:" is torchrun's; torch adds its own, "[rank1]: ", to tracebacks. In torchrun's report of a failure a line may be
# "[1]:" and nothing else.
RANK_PREFIX = re.compile(r"^\[(?:(0)\]:|(\d+)\]:(?=.))(?:\[rank\d+\]: ?)?")
# Of an error between processes, torch prints its C++ stack: long, without a word of use; the log file has it.
NATIVE_STACK = re.compile(
    r"^(?:host \d+: )?(?:\[\d+\]:)?(?:\[rank\d+\]: ?)?"
    r"(?:frame #\d+: |<omitting python frames>|Exception raised from |\[W\d+ \S+ (?:TCPStore|socket)\.cpp:\d+\] )"
)
BLANK = re.compile(r"(?:host \d+: )?(?:\[\d+\]:)?\s*")
LOG_DIR_PREFIX, LOCK = "papilio_logs_", "running.lock"
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
        self._in_native_stack = False

    def print(self, line: str) -> None:
        """Print one line, given without its newline."""
        was_native, self._in_native_stack = self._in_native_stack, NATIVE_STACK.match(line) is not None
        if self._in_native_stack or (was_native and BLANK.fullmatch(line)):
            return
        line = RANK_PREFIX.sub(lambda match: "" if match[1] else f"rank {match[2]}: ", line)
        if self._num_columns is not None and PROGRESS_BAR.search(line):
            # A line that wraps cannot be drawn over.
            self._stream.write(f"\r{fit_progress_line(line, self._num_columns - 1)}{ERASE_TO_END_OF_LINE}")
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


class _Stopper:
    """Passes the first signal to end on to the agent, which lets the ranks save; Ctrl-C after that means at once."""

    def __init__(self) -> None:
        self._agent_pid: int | None = None
        self.received: signal.Signals | None = None

    def watch(self) -> None:
        """Take over TorchX's handlers: they would end this command while the agent starts, and kill it after 10 s."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP is under nohup
                signal.signal(number, self._pass_on)

    def agent_started(self, pid: int) -> None:
        """Take note of the agent, and pass on the signal that came before it was known."""
        self._agent_pid = pid
        if self.received is not None:
            self._send(signal.SIGTERM)

    def stop(self) -> None:
        """Tell the agent to end, as a signal would."""
        self._pass_on(signal.SIGTERM, None)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self._send(signal.SIGTERM)
        elif number == signal.SIGINT:
            self._send(signal.SIGINT)
        self.received = self.received or signal.Signals(number)

    def _send(self, number: signal.Signals) -> None:
        if self._agent_pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._agent_pid, number)


def run_locally(app: specs.AppDef) -> int:
    """Run `app` (one role, one node) under TorchX's local_cwd scheduler and print its output as it comes.

    SIGINT and SIGTERM end the ranks, which may save before. After a failure the full logs of the ranks are kept.

    Returns:
        The exit status: 0 when the job succeeded, 1 when it failed, 78 when it would fail again; 75 when it was told to
        end (but not by Ctrl-C) and saved, so that it can be resumed; else 128 + the number of the signal that ended it.
    """
    errors = ErrorWatch()
    # As TorchX and torch read the logs; what this process prints is another matter (data_pipeline/terminal.py).
    app.roles[0].env["PYTHONIOENCODING"] = locale.getpreferredencoding(False)
    log_dir, lock = _make_log_dir()
    printer = LinePrinter(sys.stdout, num_columns() if can_draw_over() else None)
    try:
        status = _follow(app, log_dir, printer, errors)
    except BaseException:
        shutil.rmtree(log_dir, ignore_errors=True)
        raise
    if status in (1, NO_RESTART_EXIT_CODE):
        os.unlink(lock)
        print(f"papilio: the job failed; the log of each rank is under {log_dir}", file=sys.stderr)
        if errors.found is not None:
            print(f"papilio: first error: {errors.found}", file=sys.stderr)
    else:
        shutil.rmtree(log_dir, ignore_errors=True)
    return status


def _make_log_dir() -> tuple[str, str]:
    """Make the folder of the logs, and remove those that commands left which were killed; return it and its lock.

    A command holds a lock in its folder while it lives; folders that are kept after a failure have none.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{LOG_DIR_PREFIX}*/{LOCK}"):
        # It is another user's, or belongs to a command that lives.
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)
    log_dir = tempfile.mkdtemp(prefix=LOG_DIR_PREFIX)
    # It gets its name when it is locked; the descriptor stays open, and the lock held, as long as this process lives.
    descriptor, unnamed = tempfile.mkstemp(dir=log_dir)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.rename(unnamed, os.path.join(log_dir, LOCK))
    return log_dir, os.path.join(log_dir, LOCK)


class _Scheduler(LocalScheduler):  # type: ignore[misc]
    """TorchX's, with a look at the process that it keeps to itself, which does not outlive this one."""

    def run_local_job(self, args: list[str], **named: Any) -> subprocess.Popen[bytes]:
        """Start a replica; TorchX calls this."""
        process: subprocess.Popen[bytes] = super().run_local_job(args=bound(args), **named)
        return process

    def agent(self) -> subprocess.Popen[bytes]:
        """Return the process of the only replica of the only job."""
        (app,) = self._apps.values()
        ((replica,),) = app.role_replicas.values()
        process: subprocess.Popen[bytes] = replica.proc
        return process

    def survive_full_disk(self, log_dir: str) -> None:
        """Let TorchX's note that the job has ended be missing where the disk of the logs is full."""
        (app,) = self._apps.values()
        close = app.close

        def close_or_not() -> None:
            try:
                close()
            except OSError as error:
                app.close = lambda: None  # TorchX closes it again and again
                print(
                    f"papilio: the logs under {log_dir} cannot be written: {error.strerror}; part of what the job "
                    "printed is missing; make room there, or set TMPDIR",
                    file=sys.stderr,
                )

        app.close = close_or_not


def _follow(app: specs.AppDef, log_dir: str, printer: LinePrinter, errors: ErrorWatch) -> int:
    scheduler = _Scheduler("papilio", CWDImageProvider)
    stopper = _Stopper()
    with Runner("papilio", {"local_cwd": lambda session_name: scheduler}) as runner:
        stopper.watch()
        handle = runner.run(app, "local_cwd", cfg={"log_dir": log_dir})
        scheduler.survive_full_disk(log_dir)
        agent = scheduler.agent()
        stopper.agent_started(agent.pid)
        try:
            for line in _whole_lines(runner.log_lines(handle, app.roles[0].name, should_tail=True)):
                printer.print(line)
                errors.take(line)
            printer.end_progress()
        except BrokenPipeError:  # nobody reads on: the ranks save and end
            stopper.stop()
            runner.wait(handle, wait_interval=0.1)
            raise
        runner.wait(handle, wait_interval=0.1)
    return _exit_status(agent.returncode, stopper.received)


def _exit_status(agent_status: int, received: signal.Signals | None) -> int:
    has_saved = agent_status == RESUME_EXIT_CODE
    if received is None:
        if agent_status < 0:
            name = signal.Signals(-agent_status).name
            print(f"papilio: the agent of the ranks was killed by {name}; they ended with it", file=sys.stderr)
        return agent_status if has_saved or agent_status == NO_RESTART_EXIT_CODE else int(agent_status != 0)
    if agent_status == 0:  # the job had just ended
        return 0
    how = "the run was saved before" if has_saved else "all ranks were ended"
    print(f"papilio: stopped by {received.name}; {how}", file=sys.stderr)
    return RESUME_EXIT_CODE if has_saved and received != signal.SIGINT else 128 + received


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
