"""What is saved is finite, or not saved."""

import contextlib
import io
import re

import numpy as np
import pytest

from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.train import train
from tests.support.checkpoints import saved_tensors
from tests.support.datasets import write_dataset
from tests.support.small_runs import (
    EVERY_3,
    SGD,
    make_config,
    run,
)

# Whether the last save is committed before the run ends is not left to chance.
EACH_STEP = {"every_steps": 1, "asynchronous": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """403 samples to train on: 20 steps of 20 and one of 3 an epoch."""
    return write_dataset(tmp_path_factory.mktemp("data"))


def nan_run(ranks, config):
    from papilio.trainer.run.learning_alerts import TrainingError

    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(TrainingError, match="is NaN or infinite"):
        train(config, ranks)


@pytest.mark.parametrize(
    ("dense_scale", "saved_steps"),
    [(1e6, [1, 2]), (1e30, [])],
)
def test_what_is_saved_is_finite_when_a_run_ends_in_nan(two_ranks, tmp_path, dense_scale, saved_steps):
    data = write_dataset(tmp_path / "data", dense_scale=dense_scale)
    two_ranks.run(nan_run, make_config(data, tmp_path / "run", checkpoint=EACH_STEP, optimizer=SGD))
    folder = CheckpointFolder(str(tmp_path / "run" / "checkpoints"))
    names = folder.committed_names()
    assert [int(name[5:15]) for name in names] == saved_steps
    assert folder.names() == names, "nothing is left half-saved"
    for name in names:
        tensors = saved_tensors(tmp_path / "run" / "checkpoints" / name)
        assert tensors
        assert all(np.isfinite(values).all() for values in tensors.values())


def save_nan(ranks, config):
    """Train with a table that gets a NaN which no batch looks up."""
    import papilio.trainer.checkpoint.policy

    def due(self, current, **keywords):
        if current == 3:
            from papilio.sharding.runtime.table_shards import local_table_shards

            local_table_shards(self._saver._model.module)[0].weight[-1, 0] = float("nan")
        return original(self, current, **keywords)

    original = papilio.trainer.checkpoint.policy.Checkpoints.due
    papilio.trainer.checkpoint.policy.Checkpoints.due = due
    try:
        return run(ranks, config)
    finally:
        papilio.trainer.checkpoint.policy.Checkpoints.due = original


def test_a_table_with_nan_is_not_committed(one_rank, data, tmp_path):
    checkpoint = {**EVERY_3, "asynchronous": False}
    message = one_rank.run(
        save_nan, make_config(data, tmp_path / "run", checkpoint=checkpoint, train={"max_steps": 4})
    )[0]
    assert "holds NaN or infinite values, from which nothing can go on" in message
    assert re.match(r"SaveError: .*\bt_[abm]\b", message), "the table is named"
    assert CheckpointFolder(str(tmp_path / "run" / "checkpoints")).names() == []
