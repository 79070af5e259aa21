import pytest
import torch

from papilio.sharding.planner.make import make_plan
from papilio.trainer.run.measurement import Comparison, StepMeter, compare
from tests.support.jobs import config_of, make_cluster, make_job
from tests.support.storages import run_python

CPU = torch.device("cpu")


def close(meter, *windows):
    for step, train_s in windows:
        meter.close_window(step, train_s, device=CPU, has_only_trained=True)


def test_the_first_window_warms_up_and_the_rest_give_the_median():
    meter = StepMeter()
    assert meter.step_s is None
    close(meter, (10, 5.0))
    assert meter.step_s == 0.5
    close(meter, (20, 6.0), (30, 7.2), (35, 9.2))
    assert meter.step_s == pytest.approx(0.12)  # of .1, .12 and .4


# A process of its own: the heap of this one may hold freed memory of earlier tests, from which a block costs nothing.
MEASURE_A_BLOCK = """
import mmap, torch
from papilio.trainer.run.measurement import process_memory_bytes
before = process_memory_bytes(torch.device("cpu"))
block = torch.ones(64 << 20, dtype=torch.uint8)
mapped = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_SHARED)
mapped.write(bytes(32 << 20))
print(process_memory_bytes(torch.device("cpu")) - before)
"""


def test_memory_is_what_the_process_holds():
    """The block counts; what is shared, like a mapped file, does not. The 32 MiB written were freed."""
    process = run_python(MEASURE_A_BLOCK)
    out, err = process.communicate(timeout=120)
    assert int(out) == pytest.approx(64 << 20, rel=0.1), err


def test_memory_after_an_evaluation_does_not_count():
    meter = StepMeter()
    close(meter, (10, 1.0))
    held = meter.memory_bytes
    block = torch.ones(64 << 20, dtype=torch.uint8)
    meter.close_window(20, 2.0, device=CPU, has_only_trained=False)
    assert meter.memory_bytes == held
    assert block.numel()


def compared(ranks, seconds):
    plan = make_plan(make_job(), make_cluster(ranks_per_node=2), config_of(), recipe="r", papilio_version="0")
    meter = StepMeter()
    if seconds is not None:
        meter.close_window(1, seconds[ranks.rank], device=CPU, has_only_trained=True)
        meter.memory_bytes = [400, 900][ranks.rank]
    return plan, compare(plan, meter, ranks)


def test_the_fullest_rank_is_compared(two_ranks):
    plan, found = two_ranks.run(compared, [0.2, 0.4])[0]
    assert found.measured_step_s == pytest.approx(0.3)
    assert (found.rank, found.measured_bytes) == (1, 900)
    assert found.predicted_bytes == plan.ranks[1].memory.device_bytes
    assert found.predicted_step_s == plan.step.total_s


def test_nothing_is_compared_where_nothing_was_measured(two_ranks):
    assert [found for _, found in two_ranks.run(compared, None)] == [None, None]


def test_errors_are_of_the_prediction():
    found = Comparison("h", 1.1, 1.0, 90, 100, 0)
    assert found.step_error == pytest.approx(0.1)
    assert found.memory_error == pytest.approx(-0.1)
