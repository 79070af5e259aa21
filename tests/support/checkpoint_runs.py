"""A run with four checkpoints, 2 ranks and then 1, for the tests of `papilio checkpoint`."""

import contextlib
import io
import json

from papilio.trainer.config_file import build_config

STEPS = [5, 10, 15, 20]


def make_config(data, run_dir, max_steps, learning_rate, types):
    return build_config(
        {
            "name": "small",
            "seed": 4,
            "data": {"path": str(data), "shuffle_block_rows": 8},
            "model": {"embedding_dim": 8, "dense_arch_layer_sizes": [16], "over_arch_layer_sizes": [16]},
            "optimizer": {"sparse": {"learning_rate": learning_rate}, "dense": {"name": "sgd", "learning_rate": 0.1}},
            "train": {"global_batch_size": 20, "max_steps": max_steps, "evaluate_every_steps": 5},
            "sharding": {"types": types, "min_partition": 4},
            "checkpoint": {"every_steps": 5, "every_minutes": None, "keep_last": 100},
            "output": {"run_dir": str(run_dir), "tensorboard": False},
        },
        source="test",
    )


def run_train(ranks, config):
    from papilio.trainer.train import train

    with contextlib.redirect_stdout(io.StringIO()):
        train(config, ranks)


def folders(run):
    """Folders of the checkpoints, oldest first."""
    return sorted((run / "checkpoints").iterdir())


def marker_of(folder):
    return json.loads((folder / "checkpoint.json").read_text())["checkpoint"]


def aucs(run):
    """Validation AUC by step, as the run's own log of measurements has them."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["auc"] for line in lines if line["kind"] == "validation"}


def num_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.name != "checkpoint.json")


def flip(path, position=None):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if position is None else position] ^= 1
    path.write_bytes(raw)
