import json
from pathlib import Path

import pytest

from papilio.data_pipeline.manifest import (
    CategoricalStats,
    DatasetError,
    Manifest,
    ShardInfo,
    SplitInfo,
    read_manifest,
    write_manifest,
)
from papilio.data_pipeline.schema import TRANSFORM_VERSION, CategoricalColumn, Schema


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
        DatasetError,
        match=rf"version 99.*this Papilio reads 1 or 2 and {TRANSFORM_VERSION}.*the Papilio that wrote it \(1\.2\.3",
    ):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"{", "Expecting property name"),
        (b"[]", "it holds a JSON list, must be an object"),
        (
            b'{"format_version": 1, "transform_version": %d, "splits": {}}' % TRANSFORM_VERSION,
            "papilio_version: Field req",
        ),
        (b"\xff\xfe{}", "can't decode byte 0xff"),
        (b"[" * 100_000 + b"]" * 100_000, "nested far too deep"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "nested far too deep"),
        (b'{"format_version": ' + b"9" * 5_000 + b"}", "Exceeds the limit"),
    ],
    ids=["open", "list", "empty", "bytes", "deep list", "deep object", "digits"],
)
def test_damaged_manifest_is_refused_in_one_line(tmp_path: Path, data: bytes, what: str) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(DatasetError, match=r"manifest\.json is damaged .*preprocess the data again") as caught:
        read_manifest(str(tmp_path))
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_every_changed_bit_of_a_manifest_is_seen_or_changes_no_value(tmp_path: Path) -> None:
    write_manifest(_manifest(), str(tmp_path))
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            assert read_manifest(str(tmp_path)) == _manifest(), f"bit {place % 8} of byte {place}"
        except DatasetError:
            continue
    path.write_bytes(whole.replace(b'"num_positives": 2', b'"num_positives": 3'))
    with pytest.raises(DatasetError, match=r"damaged \(its checksum differs: a value was changed"):
        read_manifest(str(tmp_path))


def test_a_manifest_of_version_1_is_read_and_one_reformatted_too(tmp_path: Path) -> None:
    old = json.loads(_manifest().model_dump_json(exclude={"warnings"})) | {"format_version": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    assert read_manifest(str(tmp_path)).splits == _manifest().splits
    write_manifest(_manifest(), str(tmp_path))
    content = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(content, sort_keys=True))
    assert read_manifest(str(tmp_path)) == _manifest()


def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DatasetError, match=r"manifest\.json cannot be read \(Is a directory\)"):
        read_manifest(str(tmp_path))
