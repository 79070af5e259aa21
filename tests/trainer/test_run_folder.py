"""The run folder of a job that was started again."""

import json

from tests.support.datasets import write_dataset
from trainer.config_file import build_config
from trainer.run_folder import RunFolder


def test_a_run_that_goes_on_drops_what_it_will_measure_again(tmp_path):
    """Steps after the checkpoint, a line that a kill cut off, and a test split of its own step, measured after it."""
    from data_pipeline.dataset import open_dataset

    data = write_dataset(tmp_path / "data")
    config = build_config({"name": "small", "data": {"path": data}, "output": {"tensorboard": False}}, source="test")
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    entries = [("train", 10), ("validation", 12), ("test", 12), ("train", 20)]
    lines = [json.dumps({"kind": kind, "step": step}) + "\n" for kind, step in entries]
    path.write_text("".join(lines) + '{"kind": "validation", "st')
    RunFolder(str(path.parent), config, open_dataset(data), {}, step=12, validated=[12]).close()
    assert path.read_text() == lines[0] + lines[1]
