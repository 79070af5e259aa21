"""The view of all ranks while a job runs: of real ranks one is slow, each time for another reason, and it is named."""

import contextlib
import functools
import io
import json
import logging
import math
import re
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from papilio.launch.jobs.live_text import Ink, view_lines
from papilio.trainer.config_file import build_config
from papilio.trainer.elastic.health.health_store import HealthStore, RankFailure
from papilio.trainer.elastic.health.heartbeat import RankFigures
from papilio.trainer.elastic.health.job_health import JobHealth
from papilio.trainer.elastic.health.live_view import LIVE_FORMAT_VERSION, LiveView, LiveViewError, read_view
from papilio.trainer.elastic.health.live_writer import NUM_LOOKS, WRITE_REMOTE_EVERY_S, LiveWriter, Run, RunStatus
from tests.support.datasets import write_dataset
from tests.support.heartbeats import heartbeat_of

# So that an alert takes a second instead of a quarter of a minute.
BEAT_S, LOOK_EVERY_S, TIMED_EVERY_S, WINDOW_S = 0.1, 0.1, 0.004, 0.3
GLOBAL_BATCH_SIZE = 64
# What work takes by the step timer's clock, which these tests set: the machine may be busy. A slow layer takes so long
# that it is worth an alert also where steps take long.
TICK_S, LOOKUP_S, SLOW_LAYER_S = 1e-4, 1e-6, 0.15


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bags of the feature m hold 1,000 ids on average, those of a and b one."""
    rows = {"train": 50 * GLOBAL_BATCH_SIZE, "validation": 30, "test": 30}
    return write_dataset(tmp_path_factory.mktemp("data"), split_rows=rows, longest_bag=2_000)


def make_config(data, run_dir, max_steps, ranks_of_m):
    return build_config(
        {
            "name": "small",
            "data": {"path": str(data)},
            "model": {"embedding_dim": 8, "dense_arch_layer_sizes": [64, 64], "over_arch_layer_sizes": [64]},
            "optimizer": {"sparse": {"name": "sgd"}, "dense": {"name": "sgd"}},
            "train": {
                "global_batch_size": GLOBAL_BATCH_SIZE,
                "epochs": 1_000,
                "max_steps": max_steps,
                "log_every_steps": 20,
                "log_every_s": 0.1,
            },
            "sharding": {
                "constraints": [
                    {
                        "tables": ["t_m"],
                        "ranks": ranks_of_m,
                        "types": ["table_wise" if len(ranks_of_m) == 1 else "column_wise"],
                        "min_partition": 4,
                    },
                    {"tables": ["t_[ab]"], "types": ["data_parallel"], "kernels": ["dense"]},
                ]
            },
            "checkpoint": {"every_steps": 100, "every_minutes": None, "keep_best": False},
            "output": {"run_dir": str(run_dir), "tensorboard": False},
        },
        source="test",
    )


def slow_parts(rank, slow):
    """What to patch so that rank 1 is slow in its dense layers or in reading, with a clock that nothing else moves."""
    from papilio.data_pipeline.loading.batch import Batch
    from papilio.trainer import train
    from papilio.trainer.elastic.health import step_timer

    build, padded_to, lookups = train.build_sharded_model, Batch.padded_to, step_timer._lookups
    clock_s = [0.0]

    def now(timer):
        clock_s[0] += TICK_S
        return clock_s[0]

    def spend(seconds):
        clock_s[0] += seconds

    def lookups_by_ids(model):
        found = list(lookups(model))
        for lookup in found:
            lookup.register_forward_hook(lambda _, inputs, __: spend(LOOKUP_S * int(inputs[0].lengths().sum())))
        return found

    def be_slow(*_):
        time.sleep(0.01)  # so that the run lasts for some windows
        spend(SLOW_LAYER_S)

    def build_slow(*arguments):
        model = build(*arguments)
        if slow == "dense" and rank == 1:
            (layer,) = (part for name, part in model.module.named_modules() if name.endswith("dense_arch.0"))
            layer.register_forward_hook(be_slow)
        return model

    def pad_slowly(batch, size):
        time.sleep(0.1 if slow == "data" and rank == 1 else 0.0)
        return padded_to(batch, size)

    return {
        "papilio.trainer.train.build_sharded_model": build_slow,
        "papilio.data_pipeline.loading.batch.Batch.padded_to": pad_slowly,
        "papilio.trainer.elastic.health.step_timer._lookups": lookups_by_ids,
        "papilio.trainer.elastic.health.step_timer.StepTimer._now": now,
    }


def train_with_a_slow_rank(ranks, store, config, slow):
    """Train while rank 1 is slow in its dense layers or in reading; return what was printed and logged."""
    import papilio.trainer.train as entry
    from papilio.trainer.elastic.health.job_health import job_health
    from papilio.trainer.elastic.health.step_timer import StepTimer
    from papilio.trainer.elastic.health.stragglers import StragglerDetector

    log = io.StringIO()
    handler = logging.StreamHandler(log)
    detector = StragglerDetector(window_s=WINDOW_S, num_windows=2)
    quick = {
        "papilio.trainer.loop.StepTimer": functools.partial(StepTimer, every_s=TIMED_EVERY_S),
        "papilio.trainer.elastic.health.job_health.LiveWriter": functools.partial(LiveWriter, detector=detector),
        "papilio.trainer.elastic.health.live_writer.LOOK_EVERY_S": LOOK_EVERY_S,
        "papilio.trainer.elastic.health.watchdog.BEAT_S": BEAT_S,
    }
    with contextlib.ExitStack() as stack:
        for target, value in (slow_parts(ranks.rank, slow) | quick).items():
            stack.enter_context(patch(target, value))
        stack.enter_context(contextlib.redirect_stdout(log))
        logging.getLogger("papilio.trainer.elastic.health").addHandler(handler)
        health_store = HealthStore(dist.FileStore(store, -1))
        with job_health(ranks, 60.0, health_store, exit_timeout_s=None) as health:
            entry.train(config, ranks, health)
        logging.getLogger("papilio.trainer.elastic.health").removeHandler(handler)
    return log.getvalue()


@pytest.fixture
def run(two_ranks, data, tmp_path):
    """Train with rank 1 being slow; what rank 0 printed, and the last view."""

    def call(slow, max_steps, ranks_of_m=(0, 1)):
        config = make_config(data, tmp_path / "run", max_steps, list(ranks_of_m))
        printed = two_ranks.run(train_with_a_slow_rank, str(tmp_path / "store"), config, slow)
        return printed[0], read_view(str(tmp_path / "run"))

    return call


def test_a_rank_whose_dense_layers_are_slow_is_named(run):
    printed, view = run("dense", 150)
    host = view.ranks[1].host
    assert f"rank 1 (host {host}) computes its dense layers " in printed
    assert not [line for line in printed.splitlines() if line.startswith("rank 0 ") and "dense layers" in line]
    assert view.ranks[1].dense_ms > 10.0 > view.ranks[0].dense_ms
    delays_ms = [float(found) for found in re.findall(rf"slowest rank 1 \({re.escape(host)}\) by ([\d.]+) ms", printed)]
    assert delays_ms and max(delays_ms) >= 10, "in the progress line"


def test_a_rank_with_too_many_lookups_is_named_with_its_tables(run):
    printed, view = run("nothing", 700, ranks_of_m=[1])
    # Of rank 1: on a busy machine the other may really be slow for a while, too.
    start = f"rank 1 (host {view.ranks[1].host}) takes "
    alerts = [line for line in printed.splitlines() if line.startswith(start) and "everyone waits" in line]
    alerts = [line for line in alerts if " lookups (" in line]
    assert alerts
    for line in alerts:
        assert "; most bytes are read from t_m (100%); " in line
        assert line.endswith("; `papilio calibrate` and plan anew, or give sharding.constraints")


def test_a_rank_whose_data_comes_late_is_named(run):
    printed, view = run("data", 40)
    assert f"rank 1 (host {view.ranks[1].host}) waits " in printed
    assert view.ranks[1].wait_share > 0.5 > view.ranks[0].wait_share


def test_the_view_says_where_the_run_stands(run, data):
    _, view = run("nothing", 205)
    assert (view.state, view.error, view.format_version) == ("done", None, LIVE_FORMAT_VERSION)
    assert (view.step, view.num_steps, view.epoch, view.num_epochs, view.epoch_share) == (205, 205, 5, 1_000, 0.1)
    assert [(rank.rank, rank.step) for rank in view.ranks] == [(0, 205), (1, 205)]
    assert all(rank.lookup_ms > 0 and rank.dense_ms > 0 for rank in view.ranks)
    assert view.checkpoint.step == 205
    assert view.checkpoint.name.startswith("step_0000000205-")
    assert view.samples_per_s == pytest.approx(1e3 * GLOBAL_BATCH_SIZE / view.step_ms)


def write_last_view(folder, health_store, error=None, **settings):
    """What rank 0 of three leaves: rank 1 has given a heartbeat, rank 2 has not."""

    class Watched:
        def show(self, *_):
            pass

        def heartbeat(self):
            return heartbeat_of(0, 7)

    health_store.publish(heartbeat_of(1, 6, phase="loading"))
    status = RunStatus(7, 10, 70, 1.4, 1, 1, 0.7, math.nan, None, None, settings.get("alerts", ()))
    health = JobHealth(Watched(), health_store)
    health.show(lambda: None, Run("small", str(folder), 3, lambda: status))
    health.is_saved = bool(settings.get("is_saved"))
    health.close(error)
    return read_view(str(folder))


@pytest.fixture
def health_store(tmp_path: Path) -> HealthStore:
    return HealthStore(dist.FileStore(str(tmp_path / "store"), -1))


def test_ranks_without_a_heartbeat_are_left_out(tmp_path: Path, health_store: HealthStore) -> None:
    view = write_last_view(tmp_path, health_store)
    assert (view.state, view.world_size, view.loss, view.checkpoint) == ("done", 3, None, None)
    assert [(rank.rank, rank.host, rank.step, rank.phase) for rank in view.ranks] == [
        (0, "host-0", 7, "training"),
        (1, "host-1", 6, "loading"),
    ]


def test_what_is_wrong_with_the_model_is_shown(tmp_path: Path, health_store: HealthStore) -> None:
    text = "NOT LEARNING: AUC on validation is 0.4840, no better than chance"
    view = write_last_view(tmp_path, health_store, alerts=(text,))
    assert [(alert.kind, alert.ranks, alert.text) for alert in view.findings] == [("model", (), text)]
    assert f"! {text}" in view_lines(view, 100, view.unix_s, Ink(has_colors=False))


def test_a_preempted_run_says_so(tmp_path: Path, health_store: HealthStore) -> None:
    assert write_last_view(tmp_path, health_store, is_saved=True).state == "saved"


def test_a_failed_run_says_who_failed_first(tmp_path: Path, health_store: HealthStore) -> None:
    health_store.note_failure(RankFailure(2, "host-2", 6, "KeyError: 'no such thing'", 1e9))
    view = write_last_view(tmp_path, health_store, RuntimeError("Connection closed by peer"))
    assert (view.state, view.error) == (
        "failed",
        "rank 2 (host host-2) failed first, at step 6: KeyError: 'no such thing'",
    )


def test_speeds_are_those_of_the_latest_steps_also_while_the_job_validates(tmp_path, health_store):
    step = 0

    def status():
        return RunStatus(step, 1_000, 64 * step, 0.02 * step, 1, 1, 0.0, math.nan, None, None)

    def heartbeat():
        return heartbeat_of(0, step, figures=RankFigures(0.02 * step, 0.002 * step))

    writer = LiveWriter(Run("small", str(tmp_path), 1, status), health_store, heartbeat)
    assert writer.look().step_ms is None
    step = 100
    writer.look()
    step = 200
    for _ in range(3 * NUM_LOOKS):
        view = writer.look()
    assert (view.step_ms, view.samples_per_s, view.remaining_s) == pytest.approx((20.0, 3_200.0, 16.0))
    assert view.ranks[0].wait_share == pytest.approx(0.1)


def test_a_view_that_should_have_been_written_anew_is_stale() -> None:
    status = {
        "name": "s",
        "world_size": 1,
        "step": 1,
        "num_steps": 2,
        "epoch": 1,
        "num_epochs": 1,
        "epoch_share": 0.5,
    }
    view = LiveView(unix_s=1e9, interval_s=2.0, **status)
    assert not view.is_stale(1e9 + 10.9)
    assert view.is_stale(1e9 + 11.1)
    assert not view.model_copy(update={"state": "done"}).is_stale(2e9)


def test_a_remote_folder_is_written_seldom(health_store: HealthStore) -> None:
    assert LiveWriter(Run("r", "s3://b/run", 2, None), health_store, None).interval_s == WRITE_REMOTE_EVERY_S


def test_a_folder_without_a_view_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LiveViewError, match="is not a run folder; give the folder that training printed, or a job"):
        read_view(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LiveViewError, match=r"has no live\.json yet: its job has not begun to train"):
        read_view(str(tmp_path))
    (tmp_path / "live.json").write_text(json.dumps({"format_version": 9}))
    with pytest.raises(LiveViewError, match="has format version 9; this Papilio reads 1"):
        read_view(str(tmp_path))
    (tmp_path / "live.json").write_text("[1]")
    with pytest.raises(LiveViewError, match="has format version None"):
        read_view(str(tmp_path))
    (tmp_path / "live.json").write_text(json.dumps({"format_version": 1}))
    with pytest.raises(LiveViewError, match="is damaged: "):
        read_view(str(tmp_path))
