"""Several serving processes behind one port: started, told what their parent is told, and started again if they die.

They accept from the same socket and map the same tables; each has a queue and limits of its own. Needs no torch.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import time
from dataclasses import asdict, dataclass
from types import FrameType

from papilio.trainer.elastic.bootstrap import child_command
from papilio.trainer.inference.serving.metrics import Metrics
from papilio.trainer.inference.serving.serve_options import ServeOptions

logger = logging.getLogger(__name__)
_POLL_S = 0.1
# A worker that dies at once, time and again, is not to keep a core busy with starting it.
_RESTART_EVERY_S = 3.0
_MODULE = "papilio.trainer.inference.serving.main"


@dataclass(frozen=True)
class Worker:
    """What a worker is given: its number and descriptors."""

    number: int
    listener: int
    cells: int
    parent: int

    def to_argument(self) -> str:
        """Write it for a command line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_argument(text: str) -> Worker:
        """Read what `to_argument` wrote."""
        return Worker(**json.loads(text))


class _Group:
    def __init__(self, options: ServeOptions, listener: socket.socket, cells: int) -> None:
        self._options, self._listener, self._cells = options, listener, cells
        # Held open by this process alone: its end, however it comes, closes the pipe and so ends the workers.
        self._parent, self._held_open = os.pipe()
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self._started_s: dict[int, float] = {}
        self._restart_s: dict[int, float] = {}
        self._has_served = False
        self._metrics = Metrics(cells)
        self.is_stopping = False

    def start(self, number: int) -> None:
        """Start a worker."""
        worker = Worker(number, self._listener.fileno(), self._cells, self._parent)
        command = child_command(_MODULE, self._options.model_dump_json(), worker.to_argument())
        descriptors = (worker.listener, worker.cells, worker.parent)
        # A worker unblocks SIGHUP once it ends no process any more.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        # In a session of its own: Ctrl-C on a terminal reaches this process alone, which passes it on.
        self.processes[number] = subprocess.Popen(command, pass_fds=descriptors, start_new_session=True)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._started_s[number] = time.monotonic()

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Tell the workers; of SIGTERM and SIGINT, stop listening here, too."""
        if number != signal.SIGHUP:
            self.is_stopping = True
            self._listener.close()
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(number)

    def stop(self) -> None:
        """End all workers."""
        self.pass_on(signal.SIGTERM, None)

    def renew(self) -> bool:
        """Start workers again that died; False if not even one has ever been ready, so that no start can succeed."""
        self._has_served = self._has_served or any(map(self._metrics.is_ready, self.processes))
        for number, process in list(self.processes.items()):
            status = process.poll()
            if status is None:
                continue
            if number not in self._restart_s:
                logger.error("process %d of the server ended with status %d", process.pid, status)
                if not self._has_served:
                    return False
                self._restart_s[number] = max(time.monotonic(), self._started_s[number] + _RESTART_EVERY_S)
            if time.monotonic() >= self._restart_s[number]:
                del self._restart_s[number]
                self.start(number)
        return True

    def wait(self) -> bool:
        """Wait for all to end; whether all ended well (or while they were loading, by the signal that told them to)."""
        statuses = [process.wait() for process in self.processes.values()]
        return all(status in {0, -signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT} for status in statuses)


def run_workers(options: ServeOptions, listener: socket.socket, cells: int) -> int:
    """Run as many processes as the options say until told to end; return the exit status."""
    group = _Group(options, listener, cells)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, group.pass_on)
    for worker in range(options.workers):
        group.start(worker)
    while not group.is_stopping:
        time.sleep(_POLL_S)
        if not group.is_stopping and not group.renew():
            group.stop()
            group.wait()
            return 1
    return 0 if group.wait() else 1
