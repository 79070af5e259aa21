import json
from pathlib import Path

import pytest

from data_pipeline.manifest import (
    CategoricalStats,
    DatasetError,
    Manifest,
    ShardInfo,
    SplitInfo,
    read_manifest,
    write_manifest,
)
from data_pipeline.schema import CategoricalColumn, Schema


def _manifest() -> Manifest:
    stats = CategoricalStats(
        num_embeddings=5, cardinality=3, missing_rate=0.1, unknown_rate=0.0, mean_ids_per_sample=0.9, skew=0.5
    )
    shard = ShardInfo(file="train/0.arrow", num_rows=8, num_bytes=100, crc32=7)
    return Manifest(
        papilio_version="1.2.3",
        data_schema=Schema(categorical=(CategoricalColumn(name="u"),)),
        split_rule="by fraction",
        splits={
            "train": SplitInfo(num_rows=8, num_positives=2, shards=(shard,), best_auc=0.8),
            "test": SplitInfo(num_rows=2, num_positives=0, shards=()),
        },
        dense_stats={},
        categorical_stats={"u": stats},
        source={"input": "train.txt", "rows": 10},
    )


def test_manifest_is_read_as_written_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_manifest(_manifest(), str(tmp_path))
    assert read_manifest(str(tmp_path)) == _manifest()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_writing_again_replaces_an_older_manifest(tmp_path: Path) -> None:
    write_manifest(_manifest().model_copy(update={"split_rule": "old"}), str(tmp_path))
    write_manifest(_manifest(), str(tmp_path))
    assert read_manifest(str(tmp_path)).split_rule == "by fraction"


def test_rows_and_label_rate_are_counted() -> None:
    manifest = _manifest()
    assert manifest.num_rows == 10
    assert manifest.splits["train"].label_rate == 0.25


def test_folder_without_manifest_is_not_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"not a complete data set: it has no manifest\.json\. Make one with"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize("key", ["format_version", "transform_version"])
def test_other_versions_are_refused_with_both_numbers(tmp_path: Path, key: str) -> None:
    found = json.loads(_manifest().model_dump_json())
    found[key] = 99
    (tmp_path / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(
        DatasetError, match=r"version 99.*this Papilio reads 1 and 2.*the Papilio that wrote it \(1\.2\.3"
    ):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 1, "transform_version": 2, "splits": {}}'])
def test_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DatasetError, match=r"manifest\.json is damaged .*preprocess the data again"):
        read_manifest(str(tmp_path))
