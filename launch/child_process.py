"""Runs a module in a Python process of its own, for jobs that need torch: the command line itself imports none."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence

from papilio.trainer.elastic.bootstrap import child_command

# Ctrl-C on a terminal reaches the child by itself; these reach only the process that was told.
PASSED_ON = (signal.SIGTERM, signal.SIGHUP)


def run_module(module: str, arguments: Sequence[str]) -> int:
    """Run a module to its end, passing on signals to end, and return its exit status as a shell tells it.

    Raises:
        KeyboardInterrupt: the child ended by it.
    """
    # A child that starts answers Ctrl-C with a traceback of Python's own, so it unblocks it once it can do better.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    process = subprocess.Popen(child_command(module, *arguments))
    before = {number: signal.getsignal(number) for number in (*PASSED_ON, signal.SIGINT)}
    for number in PASSED_ON:
        if before[number] is not signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, lambda received, _: process.send_signal(received))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    status = status if status >= 0 else 128 - status
    if status == 128 + signal.SIGINT:  # which reached the child: say so in the words of all verbs
        raise KeyboardInterrupt
    return status
