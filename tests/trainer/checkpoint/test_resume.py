"""Runs that end and go on: bit for bit what they would have been, or refused with the differences."""

import contextlib
import errno
import io
import json
import os
import pickle
import signal
import zlib

import numpy as np
import pytest

from papilio.data_pipeline.manifest import DatasetError
from papilio.trainer.checkpoint.folder import CheckpointFolder, is_unreachable
from papilio.trainer.storage.api import StorageError
from papilio.trainer.train import train
from tests.support.checkpoints import newest, saved_tensors
from tests.support.datasets import write_dataset
from tests.support.small_runs import (
    EVERY_3,
    assert_same_runs,
    final_tensors,
    make_config,
    metric_lines,
    run,
    stop_after,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """403 samples to train on: 20 steps of 20 and one of 3 an epoch."""
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("sharding_type", ["table_wise", "row_wise", "data_parallel", "grid_shard"])
def test_a_run_that_died_ends_as_one_that_did_not(two_ranks, data, tmp_path, sharding_type):
    """Died in the middle of a report's window, at the end of an epoch, and before the first checkpoint."""
    sections = {"sharding": {"types": [sharding_type]}}
    two_ranks.run(run, make_config(data, tmp_path / "whole", **sections))
    config = make_config(data, tmp_path / "dead", **sections)
    for step in (1, 8, 21, 32):
        two_ranks.run(stop_after, config, step)
    printed = two_ranks.run(run, config)[0]
    assert "resuming from step 30, saved " in printed
    assert_same_runs(tmp_path / "dead", tmp_path / "whole")


def test_another_number_of_ranks_trains_on_the_same_samples(request, data, tmp_path):
    request.getfixturevalue("two_ranks").run(run, make_config(data, tmp_path / "whole"))
    config = make_config(data, tmp_path / "moved")
    for pool, step in (("two_ranks", 8), ("one_rank", 17), ("four_ranks", 29)):
        request.getfixturevalue(pool).run(stop_after, config, step)
    printed = request.getfixturevalue("two_ranks").run(run, config)[0]
    assert "(every_steps) on 4 rank(s)" in printed
    found, expected = final_tensors(tmp_path / "moved"), final_tensors(tmp_path / "whole")
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=0, atol=1e-5, err_msg=key)
    positions = [line.get("position") for line in metric_lines(tmp_path / "moved")]
    assert positions == [line.get("position") for line in metric_lines(tmp_path / "whole")]


def test_synchronous_saves_are_the_same(one_rank, data, tmp_path):
    for name, is_asynchronous in (("beside", True), ("between", False)):
        checkpoint = {**EVERY_3, "asynchronous": is_asynchronous}
        one_rank.run(run, make_config(data, tmp_path / name, checkpoint=checkpoint))
    assert_same_runs(tmp_path / "beside", tmp_path / "between")
    names = [
        [name[:15] for name in CheckpointFolder(str(tmp_path / run / "checkpoints")).committed_names()]
        for run in ("beside", "between")
    ]
    assert names[0] == names[1] == [f"step_{step:010}" for step in [*range(3, 43, 3)]]


def test_the_newest_and_the_best_are_kept(one_rank, data, tmp_path):
    checkpoint = {"every_steps": 3, "keep_last": 2}
    train_section = {"evaluate_every_steps": 7}
    one_rank.run(run, make_config(data, tmp_path / "run", checkpoint=checkpoint, train=train_section))
    validations = [line for line in metric_lines(tmp_path / "run") if line["kind"] == "validation"]
    best = max(validations, key=lambda line: line["auc"])["step"]
    steps = [int(name[5:15]) for name in CheckpointFolder(str(tmp_path / "run" / "checkpoints")).names()]
    assert steps == sorted({best, 39, 42})


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(raw[: len(raw) // 2])
    else:
        raw[len(raw) // 2] ^= 4
        path.write_bytes(raw)


@pytest.mark.parametrize("how", ["flipped", "cut short", "deleted"])
@pytest.mark.parametrize(
    "file", ["rank_00000_part_00000.bin", "rank_00001_part_00000.bin", "index.json", "checkpoint.json"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(two_ranks, data, tmp_path, file, how):
    if (file, how) == ("checkpoint.json", "deleted"):
        pytest.skip("without its marker it is none")
    config = make_config(data, tmp_path / "run", train={"max_steps": 9})
    two_ranks.run(run, config)
    path = newest(tmp_path / "run" / "checkpoints") / file
    damage(path, how)
    printed = two_ranks.run(run, config)[0]
    assert f"checkpoint {path.parent.name} cannot be used and is left out: {path} is " in printed
    assert "resuming from step 6, saved" in printed


@pytest.fixture(scope="module")
def nine_steps(two_ranks, data, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("nine_steps")
    two_ranks.run(run, make_config(data, folder, train={"epochs": 1, "max_steps": 9}))
    return folder


def make_unreadable(path, how):
    if how == "a link to itself":
        path.unlink()
        path.symlink_to(path.name)
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.parent.rename(path.parent.with_name("elsewhere"))
        path.parent.symlink_to(path.parent.name)


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("checkpoint.json", "a link to itself"),
        ("checkpoint.json", "a folder"),
        ("rank_00001_part_00000.bin", "a link to itself"),
        ("checkpoint.json", "all of it a link to itself"),
    ],
)
def test_one_that_cannot_be_read_is_named_and_the_one_before_used(two_ranks, data, nine_steps, tmp_path, file, how):
    """Bit for bit as if nothing had happened, also where old ones are pruned: it counts for none of those kept."""
    train_section = {"epochs": 1, "max_steps": 9}
    config = make_config(
        data, tmp_path / "run", train=train_section, checkpoint={**EVERY_3, "keep_last": 2, "asynchronous": False}
    )
    two_ranks.run(stop_after, config, 6)
    path = newest(tmp_path / "run" / "checkpoints") / file
    make_unreadable(path, how)
    printed = two_ranks.run(run, config)[0]
    (line,) = [line for line in printed.splitlines() if "cannot be used" in line]
    assert line.startswith(f"checkpoint {path.parent.name} cannot be used and is left out: could not ")
    assert f"{path} (tried once): " in line
    assert "resuming from step 3, saved" in printed
    assert_same_runs(tmp_path / "run", nine_steps)
    steps = [int(name[5:15]) for name in CheckpointFolder(str(tmp_path / "run" / "checkpoints")).names()]
    assert steps == [6, 6, 9], "that of the first try stays, two newer ones beside it"


def read_with_errno(ranks, config, word, number):
    """Train on a disk that answers with an errno when a path with this word in it is read."""
    from papilio.trainer.storage import api as storage

    def read_local(path):
        if word in path:
            raise OSError(number, os.strerror(number), path)
        return original(path)

    original = storage.read_local
    storage.read_local = read_local
    try:
        return run(ranks, config)
    finally:
        storage.read_local = original


def test_one_that_is_forbidden_is_left_out_too(two_ranks, data, tmp_path):
    config = make_config(data, tmp_path / "run", train={"max_steps": 9}, checkpoint={**EVERY_3, "asynchronous": False})
    two_ranks.run(stop_after, config, 6)
    name = newest(tmp_path / "run" / "checkpoints").name
    printed = two_ranks.run(read_with_errno, config, f"{name}/index.json", errno.EACCES)[0]
    assert f"checkpoint {name} cannot be used and is left out: could not read " in printed
    assert "Permission denied; give this user the right to it" in printed
    assert "resuming from step 3, saved" in printed


def test_a_storage_that_does_not_answer_is_no_damage():
    answers = {number: is_unreachable(StorageError("m", number)) for number in (errno.EIO, errno.EACCES, errno.ESTALE)}
    assert answers == {errno.EIO: False, errno.EACCES: False, errno.ESTALE: True}
    found = pickle.loads(pickle.dumps(StorageError("m", errno.ETIMEDOUT)))
    assert (str(found), found.errno, found.is_passing) == ("m", errno.ETIMEDOUT, True)


def test_when_all_are_damaged_nothing_is_begun_anew(one_rank, data, tmp_path):
    config = make_config(data, tmp_path / "run", train={"max_steps": 6})
    one_rank.run(run, config)
    for path in (tmp_path / "run" / "checkpoints").glob("*/index.json"):
        damage(path, "flipped")
    message = one_rank.run(run, config)[0]
    assert "CheckpointError: all 2 checkpoint(s) in" in message
    assert "are damaged or cannot be read, the newest: " in message
    assert "restore one from a backup, or choose another output.run_dir to start anew" in message


def test_one_of_another_version_is_refused_not_skipped(one_rank, data, tmp_path):
    config = make_config(data, tmp_path / "run", train={"max_steps": 6})
    one_rank.run(run, config)
    marker = newest(tmp_path / "run" / "checkpoints") / "checkpoint.json"
    tree = json.loads(marker.read_text())
    tree["checkpoint"]["format_version"] = 3
    tree["crc32"] = zlib.crc32(json.dumps(tree["checkpoint"], sort_keys=True).encode())
    marker.write_text(json.dumps(tree))
    assert "checkpoint.json has format version 3; this Papilio reads 2" in one_rank.run(run, config)[0]


def test_what_was_never_completed_is_invisible_and_swept(one_rank, data, tmp_path):
    config = make_config(data, tmp_path / "run", train={"max_steps": 6})
    one_rank.run(run, config)
    latest = newest(tmp_path / "run" / "checkpoints")
    (latest / "checkpoint.json").unlink()
    assert "resuming from step 3, saved" in one_rank.run(run, config)[0]
    assert not latest.exists()


def test_another_job_in_the_folder_is_refused_with_the_differences(one_rank, data, tmp_path):
    one_rank.run(run, make_config(data, tmp_path / "run", train={"max_steps": 3}))
    other = make_config(data, tmp_path / "run", seed=5, model={"embedding_dim": 16})
    message = one_rank.run(run, other)[0]
    assert message.startswith(
        f"CheckpointError: the run in {tmp_path / 'run' / 'checkpoints'} cannot resume with another\n"
    )
    assert "\n  model.embedding_dim = 16, was 8\n  seed = 5, was 4\n" in message
    assert "choose another output.run_dir to start anew" in message


def test_other_data_are_refused(one_rank, data, tmp_path):
    one_rank.run(run, make_config(data, tmp_path / "run", train={"max_steps": 3}))
    rows = {"train": 404, "validation": 90, "test": 60}
    other = write_dataset(tmp_path / "other", split_rows=rows)
    message = one_rank.run(run, make_config(other, tmp_path / "run"))[0]
    assert "the data set's splits: " in message
    assert "train.num_rows = 404, was 403, and " in message


def test_what_may_change_is_taken_and_recorded(one_rank, data, tmp_path):
    one_rank.run(run, make_config(data, tmp_path / "run", train={"max_steps": 9}))
    changed = make_config(
        data,
        tmp_path / "run",
        train={"global_batch_size": 40},
        optimizer={"dense": {"name": "adam", "learning_rate": 0.01}},
    )
    printed = one_rank.run(run, changed)[0]
    assert "  changed: train.global_batch_size = 40, was 20" in printed
    history = CheckpointFolder(str(tmp_path / "run" / "checkpoints")).committed()[-1].marker.progress["history"]
    assert [entry["step"] for entry in history] == [0, 9]
    assert history[1]["changes"]["optimizer.dense.learning_rate"] == [0.02, 0.01]
    # 180 samples were done. The first epoch goes on with samples 180 to 200, five batches of 40 and one of 3: 7 steps.
    lines = [line for line in metric_lines(tmp_path / "run") if line["kind"] == "train"]
    assert (lines[-1]["step"], lines[-1]["num_samples"]) == (9 + 7 + 11, 806)


def test_a_finished_run_has_nothing_left_to_do(one_rank, data, tmp_path):
    config = make_config(data, tmp_path / "run")
    one_rank.run(run, config)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    printed = one_rank.run(run, config)[0]
    assert printed == (
        f"the run in {tmp_path / 'run'} is finished (42 steps); nothing was changed. To train it further, raise "
        "--train.epochs or --train.max_steps; to begin anew, give another --output.run_dir\n"
    )
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    more = one_rank.run(run, make_config(data, tmp_path / "run", train={"epochs": 3}))[0]
    assert "resuming from step 42" in more
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_samples"] == 3 * 403


def test_a_run_that_lacks_its_summary_is_summed_up(one_rank, data, tmp_path):
    """Killed after its end was saved, or with a summary that nobody can read: nothing is trained or saved again."""
    config = make_config(data, tmp_path / "run", train={"epochs": 1})
    one_rank.run(run, config)
    names = CheckpointFolder(str(tmp_path / "run" / "checkpoints")).names()
    lines = metric_lines(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text('{"num_st')
    assert "resuming from step 21" in one_rank.run(run, config)[0]
    assert CheckpointFolder(str(tmp_path / "run" / "checkpoints")).names() == names
    assert metric_lines(tmp_path / "run") == lines
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_samples"] == 403


def unmeasured(ranks, config):
    """Train while the held-out rows cannot be read."""
    from unittest.mock import patch

    def evaluate(*_, **__):
        raise DatasetError("the shard is gone")

    with patch("papilio.trainer.reporting.evaluate", evaluate):
        return run(ranks, config)


def test_the_end_is_saved_before_anything_else(two_ranks, data, tmp_path):
    """What is measured after that is measured by the next try, which saves nothing again; the best is known then."""
    sections = {"train": {"epochs": 1}, "checkpoint": {"every_steps": None, "every_minutes": None, "keep_last": 1}}
    two_ranks.run(run, make_config(data, tmp_path / "whole", **sections))
    config = make_config(data, tmp_path / "run", **sections)
    assert two_ranks.run(unmeasured, config)[0] == "DatasetError: the shard is gone"
    saved = CheckpointFolder(str(tmp_path / "run" / "checkpoints")).committed()
    assert [(found.marker.step, found.marker.saved_for) for found in saved] == [(21, "end")]
    assert "resuming from step 21" in two_ranks.run(run, config)[0]
    assert_same_runs(tmp_path / "run", tmp_path / "whole")
    (found,) = CheckpointFolder(str(tmp_path / "run" / "checkpoints")).committed()
    assert found.name == saved[0].name
    assert found.validation_auc == metric_lines(tmp_path / "run")[-2]["auc"]


def preempt(ranks, config, step):
    """Train, with SIGTERM to the last rank after `step`; what is printed."""
    import papilio.trainer.loop

    def record(self, output, current):
        if current == step and ranks.rank == ranks.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, output, current)

    original = papilio.trainer.loop.Reporter.record
    papilio.trainer.loop.Reporter.record = record
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            summary = train(config, ranks)
    finally:
        papilio.trainer.loop.Reporter.record = original
    return summary is None, out.getvalue()


def test_sigterm_to_one_rank_saves_and_stops_all(two_ranks, data, tmp_path):
    sections = {"train": {"epochs": 20}, "checkpoint": {"every_steps": 200, "every_minutes": None, "keep_best": False}}
    two_ranks.run(run, make_config(data, tmp_path / "whole", **sections))
    config = make_config(data, tmp_path / "told", **sections)
    answers = two_ranks.run(preempt, config, 11)
    assert [is_stopped for is_stopped, _ in answers] == [True, True]
    printed = answers[0][1]
    assert "stopped after step " in printed
    assert f"start the job again with --output.run_dir={tmp_path / 'told'} to resume" in printed
    assert "(preemption)" in two_ranks.run(run, config)[0]
    assert_same_runs(tmp_path / "told", tmp_path / "whole")


def test_a_save_that_fails_does_not_end_the_training(one_rank, data, tmp_path):
    config = make_config(data, tmp_path / "run", checkpoint={**EVERY_3, "asynchronous": False}, train={"max_steps": 10})
    answers = one_rank.run(run_with_a_full_disk, config, 7)
    assert "could not be written: rank 0: " in answers[0]
    assert "training goes on without this checkpoint (the newest is of step 6)" in answers[0]
    steps = [int(name[5:15]) for name in CheckpointFolder(str(tmp_path / "run" / "checkpoints")).names()]
    assert steps == [3, 6, 10], "that of step 9 was removed"


def run_with_a_full_disk(ranks, config, begin_step):
    """Train on a disk that is full when step 9 is saved."""
    import errno

    from papilio.trainer.checkpoint import saver

    def make_folder(path):
        if "step_0000000009" in path:
            raise StorageError(f"could not write {path}: no space left", errno.ENOSPC)
        original(path)

    original = saver.make_folder
    saver.make_folder = make_folder
    try:
        return run(ranks, config)
    finally:
        saver.make_folder = original


def run_with(ranks, config, environment):
    """Train in a process that began before the S3 service did."""
    os.environ.update(environment)
    return run(ranks, config)


def test_checkpoints_lie_in_an_object_store(two_ranks, one_rank, s3, data, tmp_path):
    """Through failing requests, cut uploads and lost answers; and loaded on another number of ranks."""
    folder = s3.url("runs/a/checkpoints")
    checkpoint = {"every_steps": 5, "every_minutes": None, "keep_last": 2, "keep_best": False, "folder": folder}
    config = make_config(data, tmp_path / "run", checkpoint=checkpoint, train={"max_steps": 12})
    s3.faults.fail(2, "PUT", matching="/step_")
    s3.faults.truncate(1, matching="/step_")
    two_ranks.run(run_with, config, s3.environment)
    keys = [entry["Key"] for entry in s3.client.list_objects_v2(Bucket=s3.bucket)["Contents"]]
    assert {key.split("/")[3][:15] for key in keys} == {"step_0000000010", "step_0000000012"}
    assert not (tmp_path / "run" / "checkpoints").exists()
    s3.faults.fail(3, "GET")
    config = make_config(data, tmp_path / "run", checkpoint=checkpoint)
    printed = one_rank.run(run_with, config, s3.environment)[0]
    assert "resuming from step 12, saved" in printed
    two_ranks.run(run, make_config(data, tmp_path / "whole"))
    found, expected = metric_lines(tmp_path / "run")[-1], metric_lines(tmp_path / "whole")[-1]
    assert found["kind"] == expected["kind"] == "test"
    assert found["logloss"] == pytest.approx(expected["logloss"], abs=1e-6)


@pytest.mark.parametrize("replicas", [{"sync_every_steps": 4}, {"independent_tables": True}])
def test_replicated_groups_go_on_too(four_ranks, data, tmp_path, replicas):
    """Averaged groups save one copy of the tables, independent ones a copy each."""
    sharding = {"types": ["table_wise", "row_wise"], "replicas": {"num_groups": 2, **replicas}}
    train_section = {"epochs": 1}
    four_ranks.run(run, make_config(data, tmp_path / "whole", sharding=sharding, train=train_section))
    config = make_config(data, tmp_path / "dead", sharding=sharding, train=train_section)
    four_ranks.run(stop_after, config, 10)
    assert "resuming from step 9, saved " in four_ranks.run(run, config)[0]
    assert metric_lines(tmp_path / "dead") == metric_lines(tmp_path / "whole")
    whole, dead = (newest(tmp_path / name / "checkpoints") for name in ("whole", "dead"))
    folders = ["group_0", "group_1"] if "independent_tables" in replicas else ["."]
    for folder in folders:
        for key, values in saved_tensors(whole / folder).items():
            np.testing.assert_array_equal(saved_tensors(dead / folder)[key], values, err_msg=key)


def test_it_saves_by_the_clock_at_reports(two_ranks, data, tmp_path):
    checkpoint = {"every_steps": None, "every_minutes": 1e-6, "keep_last": 100, "keep_best": False}
    two_ranks.run(run, make_config(data, tmp_path / "run", checkpoint=checkpoint, train={"epochs": 1}))
    found = CheckpointFolder(str(tmp_path / "run" / "checkpoints")).committed()
    assert [(entry.marker.step, entry.marker.saved_for) for entry in found] == [
        *((step, "every_minutes") for step in (5, 10, 15, 20)),
        (21, "end"),
    ]


def test_a_folder_that_cannot_be_written_is_told_before_training(two_ranks, data, tmp_path):
    (tmp_path / "file").write_text("")
    for key, sections in (
        ("output.run_dir", {"output": {"run_dir": str(tmp_path / "file" / "run")}}),
        ("checkpoint.folder", {"checkpoint": {"folder": str(tmp_path / "file" / "saved")}}),
    ):
        first, second = two_ranks.run(run, make_config(data, tmp_path / "run", **sections))
        assert first == second
        assert first.startswith(f"ConfigError: {key} = {tmp_path}/file/")
        assert "a part of the path is a file, not a folder; correct the path" in first
    assert not (tmp_path / "run").exists()
