"""Exit statuses of a rank that mean something to the agent; the agent's and the command's own are the same."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

# sysexits.h, "temporary failure; the user is invited to retry": preempted and saved, start me again to resume.
RESUME_EXIT_CODE = os.EX_TEMPFAIL
# sysexits.h, "configuration error": what went wrong would go wrong again.
NO_RESTART_EXIT_CODE = os.EX_CONFIG


def exit_now(status: int) -> NoReturn:
    """End this process, at once and with this status; all that must be closed has been.

    An interpreter that ends in order aborts (status -6) when a thread of gloo or of a store is still at work, as it may
    be after an error, and as it is whenever something still refers to the process group (torch 2.13, Python 3.11).
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # nobody reads it, or there is none
            stream.flush()
    os._exit(status)


def exit_in_order_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this process through all `finally`s, which remove what was begun, with 128 + N."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, leave)
