"""Training on a GPU is training: it gives what the CPU gives, and the one resumes where the other stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import newest, saved_tensors
from tests.support.datasets import write_dataset
from tests.support.small_runs import SMALL_RECIPE, metric_lines

pytestmark = pytest.mark.gpu
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
# Sums of fp32 in another order, over 42 steps of this size; TF32 would be off by more than ten times as much.
TOLERANCE = 2e-4
SPARSE_OPTIMIZERS = ["sgd", "rowwise_adagrad", "adagrad"]


def train(folder: Path, run: str, environment: dict[str, str], *words: str) -> None:
    """A job of one rank, on the GPU unless it is hidden from it."""
    command = [sys.executable, "-m", "papilio.trainer.train", "--recipe", str(folder / "small.toml"), *words]
    done = subprocess.run(
        [*command, f"--output.run_dir={folder / run}"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "small.toml").write_text(SMALL_RECIPE.format(data=write_dataset(tmp_path / "data"), epochs=2))
    return tmp_path


def assert_close_runs(folder: Path, found: str, expected: str) -> None:
    tensors, wanted = (saved_tensors(newest(folder / run / "checkpoints")) for run in (found, expected))
    assert tensors.keys() == wanted.keys()
    for key, values in wanted.items():
        np.testing.assert_allclose(tensors[key], values, rtol=TOLERANCE, atol=TOLERANCE, err_msg=key)
    loss, expected_loss = (metric_lines(folder / run)[-1]["logloss"] for run in (found, expected))
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE)


@pytest.mark.parametrize("optimizer", SPARSE_OPTIMIZERS)
def test_a_run_on_the_gpu_gives_what_the_cpu_gives(folder: Path, optimizer: str) -> None:
    words = [f"--optimizer.sparse.name={optimizer}", "--optimizer.sparse.learning_rate=0.1"]
    train(folder, "cpu", NO_GPU, *words)
    train(folder, "gpu", {}, *words)
    assert_close_runs(folder, "gpu", "cpu")


@pytest.mark.parametrize(("first", "second"), [({}, NO_GPU), (NO_GPU, {})], ids=["gpu_then_cpu", "cpu_then_gpu"])
def test_a_checkpoint_of_the_one_resumes_on_the_other(
    folder: Path, first: dict[str, str], second: dict[str, str]
) -> None:
    train(folder, "whole", NO_GPU)
    train(folder, "resumed", first, "--train.max_steps=21")
    train(folder, "resumed", second)
    assert_close_runs(folder, "resumed", "whole")
