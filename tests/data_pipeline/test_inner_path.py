"""Names in a data set's manifest lead nowhere but into its folder."""

import json
import os
import zlib

import pytest

from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.inner_path import inner_path_problem, link_problem
from papilio.data_pipeline.manifest import DatasetError
from tests.support.datasets import write_dataset


@pytest.mark.parametrize("name", ["a", "a/b.arrow", "vocabulary/..npy", "..a", "user.id"])
def test_names_of_files_inside(name):
    assert inner_path_problem(name) is None


@pytest.mark.parametrize("name", ["", "/a", "..", "a/../b", ".", "a/", "s3://bucket/a", "a\0b", 3])
def test_names_that_lead_out(name):
    assert inner_path_problem(name) is not None


def test_a_manifest_with_a_path_of_another_folder_is_refused(tmp_path):
    folder = write_dataset(tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["crc32"]
    tree["splits"]["train"]["shards"][0]["file"] = "../other/0.arrow"
    # As whoever means harm would write it: with the checksum of the changed content.
    crc32 = zlib.crc32(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode())
    path.write_text(json.dumps({"crc32": crc32, **tree}))
    with pytest.raises(
        DatasetError, match=r"is damaged \(splits.train.shards.0.file: .*'../other/0.arrow' leads out of"
    ):
        open_dataset(folder)


def test_a_shard_that_is_a_link_to_elsewhere_is_refused(tmp_path):
    dataset = open_dataset(write_dataset(tmp_path / "data"))
    shard = dataset.open_split("train").shard_path(0)
    os.rename(shard, tmp_path / "elsewhere.arrow")
    os.symlink(tmp_path / "elsewhere.arrow", shard)
    with pytest.raises(DatasetError, match=r"is a link to .*elsewhere.arrow, outside of its folder; copy the file to"):
        dataset.open_split("train").shard(0)
    os.symlink(tmp_path / "data", tmp_path / "link")
    assert link_problem(str(tmp_path / "link"), "manifest.json") is None
