"""Training on two hosts of a real Slurm: the model is that of a local run, whatever happens on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from launch.schedulers.job_folder import read_events
from tests.support.checkpoints import newest, saved_tensors
from tests.support.datasets import write_dataset
from tests.support.slurm_cluster import SlurmCluster, pids_with
from tests.support.small_runs import SMALL_RECIPE
from tests.support.torchx_command import run_torchx
from trainer.checkpoint.folder import CheckpointFolder

TIMEOUT_S = 120


@dataclass(frozen=True)
class Place:
    """Where the jobs of this file are: the recipe, and what a local run made of it."""

    folder: Path
    recipe: Path

    def words(self, name: str, *settings: str) -> list[str]:
        """Arguments of a job on two hosts whose run folder has this name."""
        words = ["train", "--recipe", str(self.recipe), "--nnodes", "2", "--nproc", "1", "--cpu", "1"]
        return [*words, "--", f"--output.run_dir={self.folder / name}", *settings]

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """What a run has saved at its end."""
        return saved_tensors(newest(self.folder / name / "checkpoints"))


@pytest.fixture(scope="module")
def place(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("slurm")
    recipe = folder / "small.toml"
    recipe.write_text(SMALL_RECIPE.format(data=write_dataset(folder / "data"), epochs=15))
    return Place(folder, recipe)


@pytest.fixture(scope="module")
def local_job(place: Place) -> str:
    """The same job here, without Slurm: two agents of one rank, for a plan depends on the hosts."""
    done = papilio("launch", "-s", "local_cwd", *place.words("local"))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def local(place: Place, local_job: str) -> dict[str, np.ndarray]:
    """The tensors of the job that runs here, at its end."""
    done = papilio("logs", "-f", local_job)
    assert done.returncode == 0, done.stdout + done.stderr
    return place.tensors("local")


def papilio(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def launch(*words: str) -> str:
    """Submit to Slurm; return the job's handle."""
    done = papilio("launch", "-s", "slurm", *words)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"slurm://papilio/\d+\n", done.stdout)
    return done.stdout.strip()


def status_of(handle: str) -> dict[str, object]:
    done = papilio("status", handle, "--json")
    assert done.returncode == 0, done.stderr
    told: dict[str, object] = json.loads(done.stdout)
    return told


def wait_for_checkpoint(place: Place, name: str) -> None:
    folder = CheckpointFolder(str(place.folder / name / "checkpoints"))
    wait_until(lambda: bool(folder.committed_names()), f"a checkpoint of {name}")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        time.sleep(0.05)


def kill_rank(cluster: SlurmCluster, run_dir: Path, host: str) -> None:
    """Kill the rank that a job runs on this host."""
    for pid in pids_with("SLURMD_NODENAME", host, cluster.folder):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if f"--output.run_dir={run_dir}" in words and "trainer.agent" not in words:
            os.kill(pid, signal.SIGKILL)
            return
    raise AssertionError(f"no rank on {host}")


def times_resumed(job_folder: str) -> int:
    """How often the job's first rank, on whichever host, went on from a checkpoint."""
    return sum(log.read_text().count("going on after step") for log in Path(job_folder).glob("host_*.log"))


def host_names(told: dict[str, object]) -> list[str]:
    hosts = told["hosts"]
    assert isinstance(hosts, list)
    return [host["name"] for host in hosts]


def assert_same_model(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values, err_msg=key)


def test_torchx_run_trains_on_two_hosts_and_is_followed_to_its_end(
    slurm: SlurmCluster, place: Place, local_job: str, request: pytest.FixtureRequest
) -> None:
    """TorchX's own scheduler submits; its `torchx status` knows neither this Slurm's JSON nor jobs without sacct."""
    component, *words = place.words("torchx")
    done = run_torchx("run", "--workspace", "", "-s", "slurm", f"papilio.{component}", *words, cwd=place.folder)
    handle = done.stdout.split()[0]
    assert handle.startswith("slurm://torchx/"), done.stderr
    followed = papilio("logs", "-f", handle)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "small: dlrm, 921 weights on 2 rank(s)" in followed.stdout
    told = status_of(handle)
    assert (told["state"], host_names(told)) == ("SUCCEEDED", slurm.hosts[:2])
    assert f"{handle.replace('torchx/', 'papilio/')} " in papilio("list").stdout
    assert_same_model(place.tensors("torchx"), request.getfixturevalue("local"))


def test_a_killed_rank_starts_again_in_place_and_a_lost_host_is_replaced(
    slurm: SlurmCluster, place: Place, local: dict[str, np.ndarray]
) -> None:
    handle = launch(*place.words("struck"))
    wait_for_checkpoint(place, "struck")
    told = status_of(handle)
    assert (told["state"], told["attempt"], told["exit_status"]) == ("RUNNING", 1, None)
    hosts, job_folder = host_names(told), str(told["folder"])
    kill_rank(slurm, place.folder / "struck", hosts[1])
    wait_until(lambda: times_resumed(job_folder) == 1, "the ranks to start again")
    slurm.kill_host(hosts[1])
    # Slurm would find out by itself, after SlurmdTimeout.
    slurm.run("scontrol", "update", f"NodeName={hosts[1]}", "State=DOWN", "Reason=lost")
    wait_until(lambda: any(event.attempt == 2 for event in read_events(job_folder)), "Slurm to requeue the job")
    followed = papilio("logs", "-f", handle)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert re.search(r"rank \d \(host \S+\) failed first: killed by SIGKILL", followed.stdout)
    assert times_resumed(job_folder) == 2
    told = status_of(handle)
    assert (told["state"], told["attempt"], told["exit_status"]) == ("SUCCEEDED", 2, 0)
    assert hosts[1] not in host_names(told) and len(host_names(told)) == 2
    assert_same_model(place.tensors("struck"), local)
