import gc
import subprocess
import sys

import torch
from torch.profiler import profile, record_function
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.loading.loader import Loader
from papilio.trainer.optimizers import Optimizers
from papilio.trainer.runtime import configure_runtime, no_garbage_collection
from papilio.trainer.sharded_model import build_sharded_model
from tests.support.datasets import write_dataset
from tests.trainer.test_train import make_config


def test_annotations_are_there_when_a_profiler_runs():
    configure_runtime()
    with record_function("outside"), profile() as profiler, record_function("inside"):
        torch.ones(1)
    names = {event.key for event in profiler.key_averages()}
    assert "inside" in names
    assert "outside" not in names


def test_the_collector_rests_and_wakes():
    with no_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_denormals_are_flushed():
    code = (
        "import torch; from papilio.trainer import runtime; runtime.configure_runtime();"
        "print((torch.full((64,), 1e-30) * 1e-10).sum().item())"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "0.0"
    )


def objects_left_by_steps(ranks, config, counts):
    """After each count of steps without the collector: how many objects only a collection frees."""
    dataset = open_dataset(config.data.path)
    loader = Loader(dataset, "train", config.data, global_batch_size=20, num_epochs=50)
    model = build_sharded_model(config, dataset, ranks)
    optimizers = Optimizers(model.module, config.optimizer, config.schedule)
    pipeline = TrainPipelineSparseDist(model.module, optimizers.combined, ranks.device, execute_all_batches=True)
    batches = iter(loader)
    left = []
    for count in counts:
        gc.collect()
        gc.disable()
        for _ in range(count):
            pipeline.progress(batches)
        left.append(gc.collect())
        gc.enable()
    batches.close()
    return left


def test_steps_leave_no_cycles_behind(one_rank, tmp_path):
    config = make_config(write_dataset(tmp_path / "data"), tmp_path / "run")
    _, few, many = one_rank.run(objects_left_by_steps, config, (5, 5, 45))[0]
    assert many - few < 40, "40 more steps leave less than an object each"
