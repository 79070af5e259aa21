"""Agents as processes, for tests: what they print, their ranks, and an end to all of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# As in launch/components.py, but for the last call: nobody comes late to a test.
RENDEZVOUS = "join_timeout=60,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"


class AgentProcess:
    """One agent with its ranks, all of a toy job (tests/support/toy_job.py) in `folder`."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        nproc: int = 2,
        nnodes: str = "1",
        port: int = 0,
        is_host: bool = True,
        max_restarts: int = 0,
        grace_s: int = 10,
        launcher: str = "papilio.trainer.elastic.agent",
    ) -> None:
        hosting = f",is_host={int(is_host)}" if port else ""
        command = [sys.executable, "-m", launcher, f"--nnodes={nnodes}", f"--nproc-per-node={nproc}"]
        command += ["--rdzv-backend=c10d", f"--rdzv-conf={RENDEZVOUS}{hosting}", f"--rdzv-id={folder.name}"]
        command += [
            f"--rdzv-endpoint=localhost:{port}",
            f"--max-restarts={max_restarts}",
            "--tee=3",
            "--role=",
            "-m",
            "--",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace_s)}
        self._log = (folder / f"agent_{time.monotonic_ns()}.log").open("w+")
        self.process = subprocess.Popen(
            [*command, "tests.support.toy_job", str(folder), *options],
            cwd=REPOSITORY,
            env=environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    @property
    def output(self) -> str:
        """What the agent and its ranks have printed so far."""
        return Path(self._log.name).read_text()

    def wait(self, timeout_s: float = 240) -> int:
        """Wait for the agent's end and return its exit status."""
        return self.process.wait(timeout_s)

    def rank_pids(self) -> list[int]:
        """Return the pids of the agent's children."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(word) for word in children.read_text().split()] if children.exists() else []

    def kill(self) -> None:
        """End agent and ranks at once, as the loss of a host does."""
        pids = self.rank_pids()
        self.process.kill()
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        self._log.close()


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"timed out waiting for {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
