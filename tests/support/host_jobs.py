"""Jobs on hosts of one machine (tests/support/host_namespaces.py): what they print and when, and what they trained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread

from benchmarks.faults_evidence import Trained, read_logs
from benchmarks.faults_ranks import Attempt
from tests.support.host_namespaces import HostNamespaces

REPOSITORY = Path(__file__).resolve().parents[2]
# Python runs a module of this name first: where it is to be a rank, this is one, and notes what it trains. Training
# stands still at the step in the file `limit`.
SITE = """
import sys
words = sys.orig_argv
if "-m" in words and words[words.index("-m") + 1] == "papilio.trainer.train":
    from tests.support import noting_rank
    noting_rank.main(words[words.index("-m") + 2 :], {step_s})
"""


def prepare(folder: Path, limit: int, step_s: float = 0.0) -> None:
    """Let `papilio train` in this folder note what it trains, and stand still after the step `limit`."""
    (folder / "site").mkdir(parents=True)
    (folder / "rounds").mkdir()
    (folder / "site/sitecustomize.py").write_text(SITE.format(step_s=step_s))
    set_limit(folder, limit)


def set_limit(folder: Path, limit: int) -> None:
    (folder / "limit.new").write_text(str(limit))
    (folder / "limit.new").rename(folder / "limit")


def rounds(folder: Path) -> list[Attempt]:
    """Return the rounds of a job, in their order."""
    files = sorted((folder / "rounds").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return [Attempt([], int(file.read_text() or 0), str(file).removesuffix(".json"), {}) for file in files]


def trained(folder: Path) -> list[Trained]:
    """Return what each round trained."""
    return [read_logs(each) for each in rounds(folder)]


def last_step(folder: Path, world_size: int) -> int:
    """Return the newest step of the newest round, if it has so many ranks; -1 before."""
    found = rounds(folder)
    if not found or found[-1].world_size != world_size:
        return -1
    path = Path(found[-1].samples_path(0))
    entries = (
        [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
    )
    return max((entry["step"] for entry in entries if "step" in entry), default=-1)


class HostJob:
    """A command on a host, with the lines it prints."""

    def __init__(self, hosts: HostNamespaces, host: str, words: Sequence[str], folder: Path) -> None:
        self.host = host
        self.lines: list[tuple[float, str]] = []
        environment = {
            **os.environ,
            "PYTHONPATH": f"{folder}/site:{REPOSITORY}",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(folder),
        }
        self.process = subprocess.Popen(
            hosts.command(host, [sys.executable, *words], folder),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    @property
    def output(self) -> str:
        return "\n".join(line for _, line in list(self.lines))

    def wait(self, timeout_s: float = 120) -> int:
        """Wait for the command's end and return its exit status."""
        status = self.process.wait(timeout_s)
        self._reader.join(5)
        return status

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait_for(self, text: str, timeout_s: float = 120) -> float:
        """Wait until a line has this text, and return when it came."""
        found: list[float] = []

        def is_there() -> bool:
            found[:] = [moment for moment, line in list(self.lines) if text in line]
            return bool(found)

        wait_until(is_there, f"{text!r} on {self.host} in\n", timeout_s, lambda: self.output)
        return found[0]


def wait_until(
    condition: Callable[[], bool], what: str, timeout_s: float = 120, seen: Callable[[], str] = lambda: ""
) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}{seen()}"
        time.sleep(0.02)
