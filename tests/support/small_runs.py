"""Small runs that stop, go on and are held against each other."""

import contextlib
import io
import json
import logging
from pathlib import Path

import numpy as np

from papilio.data_pipeline.manifest import DatasetError
from papilio.trainer.checkpoint.format import CheckpointError
from papilio.trainer.checkpoint.saver import SaveError
from papilio.trainer.config_file import ConfigError, build_config
from papilio.trainer.storage.api import StorageError
from papilio.trainer.train import train
from tests.support.checkpoints import newest, saved_tensors

SGD = {"dense": {"name": "sgd", "learning_rate": 0.1}}
# Of a job in processes of its own, with `data` and `epochs` (21 steps each) to fill in.
SMALL_RECIPE = """
name = "small"
[data]
path = "{data}"
shuffle_block_rows = 8
[model]
embedding_dim = 8
dense_arch_layer_sizes = [16]
over_arch_layer_sizes = [16]
[train]
global_batch_size = 20
epochs = {epochs}
log_every_steps = 200
[checkpoint]
every_steps = 60
keep_best = false
[output]
tensorboard = false
"""
EVERY_3 = {"every_steps": 3, "every_minutes": None, "keep_last": 100}


def make_config(data, run_dir, **sections):
    tree = {
        "name": "small",
        "seed": 4,
        "data": {"path": str(data), "shuffle_block_rows": 8},
        "model": {"embedding_dim": 8, "dense_arch_layer_sizes": [16], "over_arch_layer_sizes": [16]},
        "optimizer": {"sparse": {"name": "rowwise_adagrad", "learning_rate": 0.1}, "dense": {"name": "adam"}},
        "schedule": {"warmup_steps": 5, "decay_start_step": 10, "decay_steps": 20},
        "train": {"global_batch_size": 20, "log_every_steps": 5, "eval_batch_size": 64, "epochs": 2},
        "checkpoint": EVERY_3,
        "output": {"run_dir": str(run_dir), "tensorboard": False},
    }
    for name, changes in sections.items():
        tree[name] = {**tree.get(name, {}), **changes} if isinstance(changes, dict) else changes
    return build_config(tree, source="test")


def run(ranks, config):
    """Train; return what was printed and logged, or the error."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("papilio.trainer").addHandler(handler)
    try:
        with contextlib.redirect_stdout(log):
            train(config, ranks)
    except (CheckpointError, ConfigError, DatasetError, SaveError, StorageError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        logging.getLogger("papilio.trainer").removeHandler(handler)
    return log.getvalue()


def stop_after(ranks, config, step):
    """Train until just after `step`, where the whole job dies without a word."""
    import papilio.trainer.checkpoint.policy

    class Dead(BaseException):
        pass

    def due(self, current, **_):
        if current > step:
            raise Dead
        return original(self, current, **_)

    original = papilio.trainer.checkpoint.policy.Checkpoints.due
    papilio.trainer.checkpoint.policy.Checkpoints.due = due
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Dead):
            train(config, ranks)
    finally:
        papilio.trainer.checkpoint.policy.Checkpoints.due = original


def metric_lines(run_dir):
    """What was measured, but for times."""
    lines = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("samples_per_s", "data_wait_share")} for line in lines]


def final_tensors(run_dir):
    return saved_tensors(newest(Path(run_dir, "checkpoints")))


def assert_same_runs(found, expected):
    tensors = final_tensors(found)
    assert tensors.keys() == final_tensors(expected).keys()
    for key, values in final_tensors(expected).items():
        np.testing.assert_array_equal(tensors[key], values, err_msg=key)
    assert metric_lines(found) == metric_lines(expected)
