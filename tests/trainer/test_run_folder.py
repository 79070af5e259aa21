"""The run folder of a job that was started again."""

import json
import os

from tests.support.datasets import write_dataset
from trainer.config import OutputConfig
from trainer.config_file import build_config
from trainer.run_folder import RunFolder, choose_run_dir


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
    RunFolder(str(path.parent), config, open_dataset(data), step=12).close()
    assert path.read_text() == lines[0] + lines[1]


def test_jobs_that_begin_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.run_folder.time.strftime", lambda *_: "20260102-030405")
    config, found = OutputConfig(runs_dir=str(tmp_path)), []
    for _ in range(3):
        found.append(choose_run_dir(config, "small"))
        os.mkdir(found[-1])
    first = f"{tmp_path}/small-20260102-030405"
    assert found == [first, f"{first}-2", f"{first}-3"]
