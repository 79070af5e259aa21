"""`papilio train`, as people start it: a rank is killed, the job is told to end, and the model comes out the same."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from papilio.trainer.checkpoint.folder import CheckpointFolder
from tests.support.checkpoints import newest, saved_tensors
from tests.support.datasets import write_dataset
from tests.support.small_runs import SMALL_RECIPE

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    path = folder / "small.toml"
    path.write_text(SMALL_RECIPE.format(data=write_dataset(folder / "data"), epochs=30))
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe):
    """Tensors of a run that nobody disturbed: 630 steps."""
    run_dir = recipe.parent / "undisturbed"
    job = start(recipe, run_dir)
    out, _ = job.communicate(timeout=240)
    assert job.returncode == 0, out
    return final_tensors(run_dir)


def start(recipe, run_dir, nproc=2):
    command = [sys.executable, "-m", "papilio.launch.cli", "train", "--recipe", recipe, "--nproc", str(nproc)]
    command.append(f"--output.run_dir={run_dir}")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def final_tensors(run_dir):
    return saved_tensors(newest(run_dir / "checkpoints"))


def wait_for_checkpoint(run_dir, step, job):
    deadline = time.monotonic() + 120
    folder = CheckpointFolder(str(run_dir / "checkpoints"))
    while not any(int(name[5:15]) >= step for name in folder.committed_names()):
        assert time.monotonic() < deadline and job.poll() is None, "no checkpoint was saved"
        time.sleep(0.02)


def pid_of_rank(run_dir, rank):
    """The process of a rank of the job with this run folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode().split("\0")
            environment = (process / "environ").read_bytes().decode().split("\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if f"--output.run_dir={run_dir}" in command and f"RANK={rank}" in environment:
            return int(process.name)
    raise AssertionError(f"no process of rank {rank}")


def assert_same_model(run_dir, expected):
    found = final_tensors(run_dir)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values, err_msg=key)


def test_a_killed_rank_restarts_the_job_from_its_checkpoint(recipe, undisturbed):
    run_dir = recipe.parent / "killed"
    job = start(recipe, run_dir)
    wait_for_checkpoint(run_dir, 120, job)
    os.kill(pid_of_rank(run_dir, 1), signal.SIGKILL)
    out, _ = job.communicate(timeout=240)
    assert job.returncode == 0, out
    assert "failed first: killed by SIGKILL" in out
    assert "restarting, restart 1 of 3" in out
    assert "Traceback" not in out
    assert "resuming from step " in out
    assert_same_model(run_dir, undisturbed)


def test_a_job_that_is_told_to_end_saves_and_goes_on_when_started_again(recipe, undisturbed):
    run_dir = recipe.parent / "told"
    job = start(recipe, run_dir)
    wait_for_checkpoint(run_dir, 60, job)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 75, out
    assert "stopped after step " in out
    assert f"start the job again with --output.run_dir={run_dir} to go on" in out
    again = start(recipe, run_dir)
    out, _ = again.communicate(timeout=240)
    assert again.returncode == 0, out
    assert "(preemption)" in out
    assert_same_model(run_dir, undisturbed)
