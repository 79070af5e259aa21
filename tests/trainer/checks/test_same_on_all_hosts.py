"""Hosts of one job that were not given the same: another recipe, data set, package or folder under the same name."""

from functools import partial

import pytest

from papilio.data_pipeline.dataset import open_dataset
from papilio.trainer.checkpoint import folder as checkpoint_folder
from papilio.trainer.checkpoint.format import Block, Index, SavedTensor
from papilio.trainer.checkpoint.policy import RunIdentity
from papilio.trainer.checkpoint.saver import LostTableError, check_whole
from papilio.trainer.checks import same_on_all_hosts
from papilio.trainer.checks.same_on_all_hosts import HostsDifferError, check_same_folder_on_all, check_same_job_on_all
from papilio.trainer.run.folder import data_identity
from tests.support.datasets import SPLIT_ROWS, write_dataset
from tests.support.small_runs import make_config, run


def on_hosts(ranks, check, argument, *more):
    """Make a check on ranks that believe to be on a host each; return its error."""
    before, same_on_all_hosts.host_name = same_on_all_hosts.host_name, lambda: f"n{ranks.rank}"
    try:
        check(*more, argument[ranks.rank], ranks)
    except HostsDifferError as error:
        return str(error)
    finally:
        same_on_all_hosts.host_name = before
    return ""


def compare(ranks, by_rank):
    return on_hosts(ranks, check_same_job_on_all, by_rank)


def look(ranks, by_rank):
    return on_hosts(ranks, partial(check_same_folder_on_all, timeout_s=0.0), by_rank, "output.run_dir")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"))


def identity(data, versions=("torch", "2.13.0"), **sections):
    config = make_config(data, "run", **sections)
    return RunIdentity(config.model_dump(mode="json"), data_identity(open_dataset(data)), dict([versions]))


def test_another_learning_rate_under_the_same_recipe_is_named_with_both_hosts(two_ranks, data):
    one = identity(data, optimizer={"dense": {"name": "adam", "learning_rate": 0.1}})
    other = identity(data, optimizer={"dense": {"name": "adam", "learning_rate": 0.2}})
    said = two_ranks.run(compare, [one, other])
    assert said[0] == said[1]
    assert said[0] == (
        "the hosts of this job do not have the same: optimizer.dense.learning_rate = 0.1 on host n0 (rank 0), 0.2 on "
        "host n1 (rank 1). Bring the same recipe, data set and packages to all hosts, and start again"
    )


def test_another_data_set_under_the_same_path_is_named_and_the_same_at_another_path_is_not(two_ranks, data, tmp_path):
    copy = write_dataset(tmp_path / "copy")
    assert two_ranks.run(compare, [identity(data), identity(copy)]) == ["", ""]
    larger = write_dataset(tmp_path / "larger", split_rows={**SPLIT_ROWS, "train": 600})
    said = two_ranks.run(compare, [identity(data), identity(larger)])
    for part in ("the data set's train.num_rows = 403 on host n0 (rank 0), ", "the data set's splits = checksum "):
        assert part in said[1]


def test_another_version_of_a_package_is_named(two_ranks, data):
    said = two_ranks.run(compare, [identity(data), identity(data, ("torch", "2.11.0"))])
    assert "version of torch = 2.13.0 on host n0 (rank 0), 2.11.0 on host n1 (rank 1)" in said[0]


def test_a_folder_that_is_not_shared_is_found_before_anything_is_allocated(two_ranks, tmp_path):
    (tmp_path / "b").mkdir()
    said = two_ranks.run(look, [str(tmp_path / "a"), str(tmp_path / "b")])
    assert said[0].removeprefix(f"{tmp_path}/a") == said[1].removeprefix(f"{tmp_path}/b")
    assert "is not one folder on all hosts: host n1 (rank 1) did not see what rank 0 (host n0) wrote there" in said[0]
    assert said[0].endswith("or name one that all share with --output.run_dir=")
    assert two_ranks.run(look, [str(tmp_path / "a")] * 2) == ["", ""]
    assert not list((tmp_path / "a").iterdir()), "the probe is removed"


def run_with_parts_of_rank_1_elsewhere(ranks, config):
    from papilio.trainer.checkpoint import dcp_storage

    before, seconds = dcp_storage.write_file, checkpoint_folder.SEEN_TIMEOUT_S
    checkpoint_folder.SEEN_TIMEOUT_S = 0.0
    if ranks.rank == 1:
        dcp_storage.write_file = lambda path, chunks: before(f"{path}.elsewhere", chunks)
    try:
        return run(ranks, config)
    finally:
        dcp_storage.write_file, checkpoint_folder.SEEN_TIMEOUT_S = before, seconds


def test_no_checkpoint_is_committed_before_every_part_is_seen(two_ranks, data, tmp_path):
    config = make_config(data, tmp_path / "run", train={"max_steps": 2})
    said = two_ranks.run(run_with_parts_of_rank_1_elsewhere, config)[0]
    assert "rank_00001_part_00000.bin is missing; do all hosts write to one shared folder there?" in said
    assert not (tmp_path / "run/checkpoints").exists(), "nothing is left of it"


def test_a_checkpoint_without_a_planned_table_is_refused():
    whole = SavedTensor("float32", (4, 2), (Block((0, 0), (4, 2), "f", 0, 32, 0),))
    half = SavedTensor("float32", (4, 2), (Block((0, 0), (2, 2), "f", 0, 16, 0),))
    check_whole(Index({"tables.a.weight": whole, "dense.w": whole}), {"a": (4, 2)})
    with pytest.raises(LostTableError, match=r"lacks b, dense\.w \(4 of 8 values\), which the plan has"):
        check_whole(Index({"tables.a.weight": whole, "dense.w": half}), {"a": (4, 2), "b": (4, 2)})
