"""Starts the ranks that measure the links (trainer/calibration/link_speed.py) here, and reads what they print."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Thread
from typing import IO, Any

from papilio.launch.preflight.facts import LinkFacts, RankSpeed
from papilio.trainer.elastic.bootstrap import bound, module_command


@dataclass(frozen=True)
class LinkJob:
    """The ranks of one host among those of all: `num_hosts` and `index` count the hosts that are there."""

    index: int
    num_hosts: int
    nproc: int
    master_address: str
    master_port: int
    timeout_s: float


def measure_links(job: LinkJob) -> LinkFacts:
    """Run this host's ranks until they end or the time is over."""
    ranks = [_Rank(job, local_rank) for local_rank in range(job.nproc)]
    deadline = time.monotonic() + job.timeout_s
    for rank in ranks:
        rank.wait(max(0.1, deadline - time.monotonic()))
    return LinkFacts(
        speeds=tuple(RankSpeed.model_validate(rank.speed) for rank in ranks if rank.speed is not None),
        errors=tuple(rank.error for rank in ranks if rank.error),
    )


class _Rank:
    """One process, and what it has said so far."""

    def __init__(self, job: LinkJob, local_rank: int) -> None:
        self.number = job.index * job.nproc + local_rank
        self.speed: dict[str, Any] | None = None
        self.error = ""
        self._timeout_s = job.timeout_s
        self._phase = "starting"
        self._last_words: list[str] = []
        self._process = subprocess.Popen(
            bound(module_command("papilio.trainer.calibration.link_speed"), signal.SIGKILL),
            env={**os.environ, **_environment(job, local_rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        assert self._process.stdout is not None and self._process.stderr is not None
        self._readers = [
            Thread(target=self._read, args=(self._process.stdout,), daemon=True),
            Thread(target=self._keep, args=(self._process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def wait(self, timeout_s: float) -> None:
        """Wait for the end; a rank that does not come to it is killed."""
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self.error = f"rank {self.number} was still {self._doing()} after {self._timeout_s:g} s"
            return
        for reader in self._readers:
            reader.join(5.0)
        if self.speed is None:
            words = "; ".join(self._last_words[-1:]) or f"exit status {status}"
            self.error = f"rank {self.number} failed while {self._doing()}: {words}"

    def _doing(self) -> str:
        return self._phase if self._phase.endswith("ing") or " " in self._phase else f"in the {self._phase}"

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            try:
                said = json.loads(line)
            except ValueError:
                continue
            self._phase = said.get("phase", self._phase)
            self.speed = said.get("speed", self.speed)

    def _keep(self, stream: IO[str]) -> None:
        for line in stream:
            if line.strip():
                self._last_words = [*self._last_words[-4:], line.strip()]


def _environment(job: LinkJob, local_rank: int) -> Mapping[str, str]:
    return {
        "RANK": str(job.index * job.nproc + local_rank),
        "WORLD_SIZE": str(job.num_hosts * job.nproc),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(job.nproc),
        "MASTER_ADDR": job.master_address,
        "MASTER_PORT": str(job.master_port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
