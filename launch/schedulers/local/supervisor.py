"""Starts the hosts of one local job, waits for them, and writes down how it went: `python -m` with the job's folder.

SIGTERM is passed on to the agents, whose ranks save; those that do not end are killed after the agents' own grace.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from papilio.trainer.elastic.bootstrap import bound
from papilio.trainer.elastic.exit_codes import NO_RESTART_EXIT_CODE, RESUME_EXIT_CODE

PROCESSES, PID = "processes.json", "supervisor.pid"
CANCELLED = "cancelled"
POLL_S = 0.05
# Beyond the grace that the agents give their ranks.
MARGIN_S = 10.0
DEFAULT_GRACE_S = 30.0
# After the first host has failed, for the others to find out and say so.
WAIT_FOR_HOSTS_S = 60.0


def main(folder: Path) -> int:
    """Run the job in `folder` to its end and return its status: 0, or that of its hosts."""
    (folder / PID).write_text(f"{os.getpid()} {start_time(os.getpid())}\n")
    plan = json.loads((folder / PROCESSES).read_text())
    supervisor = Supervisor(folder, plan["hosts"])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, supervisor.cancel)
    for attempt in range(1, plan["max_retries"] + 2):
        status = supervisor.run(attempt)
        if status in (0, RESUME_EXIT_CODE, NO_RESTART_EXIT_CODE) or supervisor.is_cancelled:
            break
        if attempt <= plan["max_retries"]:
            supervisor.note("retried", f"status {status}")
    return status


class Supervisor:
    """The processes of one attempt after the other."""

    def __init__(self, folder: Path, hosts: list[dict[str, Any]]) -> None:
        """`hosts` are commands with their environments."""
        self._folder, self._hosts = folder, hosts
        self._processes: list[subprocess.Popen[bytes]] = []
        self._attempt = 1
        self._deadline_s: float | None = None
        self.is_cancelled = False

    def run(self, attempt: int) -> int:
        """Start all hosts, wait for them, and return their status: the largest, or 78 if one of them says so."""
        self._attempt, self._processes, self._deadline_s = attempt, [], None
        self.note("begins", " ".join(["localhost"] * len(self._hosts)))
        for host, started in enumerate(self._hosts):
            self._processes.append(self._start(host, started["command"], started["environment"]))
        if self.is_cancelled:  # while they were being started
            self._pass_on(signal.SIGTERM)
        ended: set[int] = set()
        while len(ended) < len(self._processes):
            for host, process in enumerate(self._processes):
                if host not in ended and process.poll() is not None:
                    ended.add(host)
                    self.note("ended", str(_status(process)), f"host_{host}.events")
                    self._set_deadline(WAIT_FOR_HOSTS_S)
            if self._deadline_s is not None and time.monotonic() > self._deadline_s:
                self._pass_on(signal.SIGKILL)
            time.sleep(POLL_S)
        statuses = {_status(process) for process in self._processes}
        status = NO_RESTART_EXIT_CODE if NO_RESTART_EXIT_CODE in statuses else max(statuses)
        self.note("ended", str(status))
        return status

    def cancel(self, number: int, frame: FrameType | None) -> None:
        """Tell the agents to end."""
        if not self.is_cancelled:
            self.is_cancelled = True
            self.note(CANCELLED, signal.Signals(number).name)
            self._pass_on(signal.SIGTERM)
            grace_s = self._hosts[0]["environment"].get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", DEFAULT_GRACE_S)
            self._set_deadline(float(grace_s) + MARGIN_S)

    def note(self, what: str, words: str, file: str = "job.events") -> None:
        """Add a line to the events of the job or of a host."""
        with (self._folder / file).open("a", encoding="utf-8") as events:
            events.write(f"{time.time():.3f}\t{self._attempt}\t{what}\t{words}\n")

    def _start(self, host: int, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with (self._folder / f"host_{host}.log").open("ab", buffering=0) as log:
            log.write(f"papilio: attempt {self._attempt} on host {host} of {len(self._hosts)}\n".encode())
            return subprocess.Popen(
                bound(command),
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _set_deadline(self, timeout_s: float) -> None:
        self._deadline_s = min(self._deadline_s or float("inf"), time.monotonic() + timeout_s)

    def _pass_on(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)


def is_supervised(folder: str) -> bool:
    """Whether the supervisor of a job's folder runs on this machine."""
    try:
        words = Path(folder, PID).read_text(errors="replace").split()
    except OSError:
        return False
    return len(words) == 2 and words[0].isdecimal() and start_time(int(words[0])) == words[1]


def start_time(pid: int) -> str | None:
    """When a process started, which tells it from a later one of the same number; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


def _status(process: subprocess.Popen[bytes]) -> int:
    """As a shell has it: 128 + the signal that ended it."""
    status = process.poll()
    assert status is not None
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
