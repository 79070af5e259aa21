"""A training job on two hosts of a real Slurm: whatever happens on the way, the model is that of a local run.

Where root allows, each host has a network of its own and is lost for real: its processes end, and its link goes before,
so that nobody is told. Elsewhere the hosts are on loopback, and Slurm is told.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from papilio.launch.schedulers.job_folder import read_events
from papilio.trainer.checkpoint.folder import CheckpointFolder
from tests.support.checkpoints import newest, saved_tensors
from tests.support.datasets import write_dataset
from tests.support.host_namespaces import HostNamespaces, why_not_here
from tests.support.slurm_cluster import SlurmCluster, free_ports, pids_with
from tests.support.slurm_programs import SlurmPrograms
from tests.support.small_runs import SMALL_RECIPE
from tests.support.torchx_command import REPOSITORY, run_torchx

TIMEOUT_S = 120
# Slurm's own default is 300.
HOST_TIMEOUT_S = 5
# More than ranks need to save on a busy machine, and less than the cluster's KillWait.
GRACE_S = 15


@dataclass(frozen=True)
class Place:
    """Where jobs are submitted: a cluster, and a folder with a recipe and all that its jobs leave."""

    cluster: SlurmCluster
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        state = {"XDG_STATE_HOME": str(self.folder / "state"), "PYTHONPATH": str(REPOSITORY)}
        return {**self.cluster.environment, **state}

    def words(self, run_dir: str, *more: str) -> list[str]:
        """Arguments of a job on two hosts, whose run folder has this name."""
        words = ["train", "--recipe", "small.toml", "--nnodes", "2", "--nproc", "1", "--cpu", "1"]
        return [*words, "--grace_s", str(GRACE_S), *more, "--", f"--output.run_dir={run_dir}"]

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a command of ours, where Slurm can be asked."""
        command = self.cluster.command([sys.executable, "-m", "papilio.launch.cli", *words])
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=self.environment, cwd=self.folder)

    def papilio(self, *words: str, status: int = 0) -> str:
        """Run a command of ours and return what it printed."""
        process = self.start(*words)
        out, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == status, out + err
        return out

    def torchx(self, *words: str) -> str:
        """Run one of TorchX's."""
        done = run_torchx(*words, cwd=self.folder, environment=self.environment, place=self.cluster.command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self, handle: str, code: int = 0) -> dict[str, object]:
        told: dict[str, object] = json.loads(self.papilio("status", handle, "--json", status=code))
        return told

    def checkpoints(self, run_dir: str) -> list[str]:
        return CheckpointFolder(str(self.folder / run_dir / "checkpoints")).committed_names()

    def tensors(self, run_dir: str) -> dict[str, np.ndarray]:
        """What a run has saved at its end."""
        return saved_tensors(newest(self.folder / run_dir / "checkpoints"))


@pytest.fixture
def place(slurm_programs: SlurmPrograms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    # Long enough for commands to find the job still training, also on a busy machine.
    (tmp_path / "small.toml").write_text(SMALL_RECIPE.format(data=write_dataset(tmp_path / "data"), epochs=45))
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:
        has_root = not why_not_here()
        namespaces = stack.enter_context(HostNamespaces(tmp_path, ["n1", "n2", "n3"])) if has_root else None
        cluster = SlurmCluster(slurm_programs, 3, host_timeout_s=HOST_TIMEOUT_S, namespaces=namespaces)
        yield Place(stack.enter_context(cluster), tmp_path)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        time.sleep(0.05)


def kill_rank(cluster: SlurmCluster, run_dir: str, host: str) -> None:
    """Kill the rank that a job runs on this host."""
    for pid in pids_with("SLURMD_NODENAME", host, cluster.folder):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if f"--output.run_dir={run_dir}" in words and "papilio.trainer.elastic.agent" not in words:
            os.kill(pid, signal.SIGKILL)
            return
    raise AssertionError(f"no rank on {host}")


def times_resumed(logs: Iterator[Path]) -> int:
    """How often the job's first rank, on whichever host, went on from a checkpoint."""
    return sum(log.read_text().count("resuming from step") for log in logs)


def host_names(told: dict[str, object]) -> list[str]:
    hosts = told["hosts"]
    assert isinstance(hosts, list)
    return [host["name"] for host in hosts]


def lose_a_host(place: Place, meanwhile: Callable[[], None]) -> str:
    """Start a job, take one of its hosts, and return the job's handle once it goes on, on other hosts.

    `meanwhile` is for the time in which Slurm finds out.
    """
    handle = place.papilio("launch", "-s", "slurm", *place.words("struck")).strip()
    assert re.fullmatch(r"slurm://papilio/\d+", handle)
    wait_until(lambda: bool(place.checkpoints("struck")), "a checkpoint")
    told = place.status(handle)
    assert (told["state"], told["attempt"], told["exit_status"]) == ("RUNNING", 1, None)
    hosts, job_folder = host_names(told), Path(str(told["folder"]))
    assert hosts == place.cluster.hosts[:2]
    place.cluster.kill_host(hosts[1])
    meanwhile()
    wait_until(lambda: any(event.attempt == 2 for event in read_events(str(job_folder))), "Slurm to requeue the job")
    wait_until(lambda: times_resumed(job_folder.glob("host_*.log")) == 1, "the ranks to go on")
    told = place.status(handle)
    assert (told["state"], told["attempt"]) == ("RUNNING", 2)
    assert host_names(told) == [place.cluster.hosts[0], place.cluster.hosts[2]]
    return handle


def cancel(place: Place, handle: str) -> None:
    """End a job, whose ranks save first."""
    place.papilio("cancel", handle)
    place.papilio("logs", "-f", handle, status=75)
    told = place.status(handle, code=4)
    assert (told["state"], told["message"]) == ("CANCELLED", "CANCELLED, the ranks saved before")
    saved = CheckpointFolder(str(place.folder / "struck" / "checkpoints"))
    assert saved.read_marker(saved.committed_names()[-1]).saved_for == "preemption"


def kill_a_rank_under_torchx(place: Place) -> str:
    """Go on with the same run under TorchX's own command, and kill a rank once it has; return the handle."""
    # On loopback all hosts have the same ports, and TorchX gives each job the same.
    component, *words = place.words("struck", "--rdzv_port", str(free_ports(1)[0]))
    handle = place.torchx("run", "--workspace", "", "-s", "slurm", f"papilio.{component}", *words).split()[0]
    assert handle.startswith("slurm://torchx/")
    logs = f"slurm-{handle.rpartition('/')[2]}-train-*.out"
    wait_until(lambda: times_resumed(place.folder.glob(logs)) == 1, "the ranks to go on after what was saved")
    kill_rank(place.cluster, "struck", place.cluster.hosts[2])
    followed = place.papilio("logs", "-f", handle)
    assert re.search(r"rank \d \(host \S+\) failed first: killed by SIGKILL", followed)
    assert times_resumed(place.folder.glob(logs)) == 2
    return handle


def test_whatever_happens_to_a_job_the_model_is_that_of_a_local_run(place: Place) -> None:
    """A host is lost, then the job is cancelled, started again by `torchx run`, and one of its ranks killed."""
    local: list[subprocess.Popen[str]] = []
    locally = ["launch", "-s", "local_cwd", "--follow", *place.words("local", "--preflight", "true")]
    handle = lose_a_host(place, lambda: local.append(place.start(*locally)))
    cancel(place, handle)
    handle = kill_a_rank_under_torchx(place)
    told = json.loads(place.torchx("status", "--json", handle))
    assert told["state"] == "SUCCEEDED"
    told = place.status(handle)
    assert (told["state"], host_names(told)) == ("SUCCEEDED", [place.cluster.hosts[0], place.cluster.hosts[2]])
    assert f"{handle.replace('torchx/', 'papilio/')} " in place.papilio("list")
    out, err = local[0].communicate(timeout=TIMEOUT_S)
    assert local[0].returncode == 0, out + err
    assert out.index("\nready") < out.index("small: dlrm, 921 weights on 2 rank(s)")
    found, expected = place.tensors("struck"), place.tensors("local")
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values, err_msg=key)
