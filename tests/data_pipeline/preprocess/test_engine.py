"""The whole of preprocessing against a slow statement of it in plain Python: dictionaries, loops and math.log1p."""

import gzip
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zstandard
from iopath.common.file_io import PathHandler

from papilio.data_pipeline.manifest import MANIFEST_NAME, read_manifest
from papilio.data_pipeline.paths import path_manager
from papilio.data_pipeline.preprocess import byte_blocks, criteo, key_runs, vocabulary_stage
from papilio.data_pipeline.preprocess.bad_rows import PreprocessError
from papilio.data_pipeline.preprocess.engine import preprocess
from papilio.data_pipeline.shards import open_shard
from tests.support.criteo_text import all_bytes, criteo_lines, criteo_options, splitmix64

SPLITS = ("train", "validation", "test")


def oracle(lines: list[bytes], split_of: list[str], threshold: int = 1, max_ids: int = 10**9, buckets: int = 0):
    """Rows of each split as (label, dense, ids), and each column's vocabulary by rank."""
    rows = [line.decode().split("\t") for line in lines]
    vocabularies = []
    for c in range(26):
        counts = Counter(
            int(row[14 + c], 16) for row, split in zip(rows, split_of, strict=True) if split == "train" and row[14 + c]
        )
        kept = [(-count, key) for key, count in counts.items() if count >= threshold]
        vocabularies.append([key for _, key in sorted(kept)[:max_ids]])
    id_of = [{key: 2 + rank for rank, key in enumerate(keys)} for keys in vocabularies]

    def to_id(c: int, field: str) -> int:
        if field == "":
            return 1
        if buckets:
            return 2 + splitmix64(int(field, 16)) % (buckets - 2)
        return id_of[c].get(int(field, 16), 0)

    result = {split: [] for split in SPLITS}
    for row, split in zip(rows, split_of, strict=True):
        dense = [math.log1p(max(int(field), 0)) if field else 0.0 for field in row[1:14]]
        result[split].append((int(row[0]), dense, [to_id(c, field) for c, field in enumerate(row[14:])]))
    return result, vocabularies


def days_split(rows_per_file: list[int]) -> list[str]:
    total = sum(rows_per_file)
    last = rows_per_file[-1] if len(rows_per_file) > 1 else total // 7
    return ["train"] * (total - last) + ["validation"] * (last // 2) + ["test"] * (last - last // 2)


def assert_equal_to_oracle(folder: Path, expected) -> None:
    manifest = read_manifest(str(folder))
    for split in SPLITS:
        shards = [open_shard(info, manifest.data_schema, str(folder)) for info in manifest.splits[split].shards]
        rows = expected[split]
        assert manifest.splits[split].num_rows == len(rows) == sum(shard.num_rows for shard in shards)
        assert manifest.splits[split].num_positives == sum(label for label, _, _ in rows)
        if not rows:
            continue
        assert np.concatenate([shard.labels for shard in shards]).tolist() == [label for label, _, _ in rows]
        dense = np.concatenate([shard.dense for shard in shards])
        np.testing.assert_array_equal(dense, np.array([dense for _, dense, _ in rows], np.float32))
        for c in range(26):
            ids = np.concatenate([shard.bags[c].ids for shard in shards])
            assert ids.tolist() == [ids[c] for _, _, ids in rows], f"column {c} of {split}"


@pytest.fixture
def small_pieces(monkeypatch):
    """Many blocks, slices and key ranges in a small file."""
    monkeypatch.setattr(byte_blocks.read_blocks, "__defaults__", (30_000,))
    monkeypatch.setattr(criteo, "_SLICE_BYTES", 4_000)
    monkeypatch.setattr(key_runs, "RANGE_KEYS", 50)
    monkeypatch.setattr(key_runs, "_SAMPLED_KEYS", 100)
    monkeypatch.setattr(vocabulary_stage, "_MIN_SLACK_KEYS", 5)


@pytest.mark.parametrize(("block_bytes", "slice_bytes"), [(8 << 20, 1 << 18), (20_000, 3_000), (997, 500)])
def test_one_file_equals_the_oracle_whatever_the_cuts(tmp_path, monkeypatch, block_bytes, slice_bytes):
    lines = criteo_lines(1_000)
    (tmp_path / "train.txt").write_bytes(b"\n".join(lines) + b"\n")
    monkeypatch.setattr(byte_blocks.read_blocks, "__defaults__", (block_bytes,))
    monkeypatch.setattr(criteo, "_SLICE_BYTES", slice_bytes)
    preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "out", frequency_threshold=2))
    expected, vocabularies = oracle(lines, days_split([1_000]), threshold=2)
    assert_equal_to_oracle(tmp_path / "out", expected)
    for c, keys in enumerate(vocabularies):
        assert np.load(tmp_path / "out" / "vocabulary" / f"C{c + 1}.npy").tolist() == keys


def test_several_files_ranges_and_shards_equal_the_oracle(tmp_path, small_pieces):
    files = [criteo_lines(rows, seed) for seed, rows in enumerate([3_000, 2_500, 301])]
    for day, lines in enumerate(files):
        (tmp_path / f"day_{day}").write_bytes(b"\n".join(lines) + b"\n")
    paths = [tmp_path / f"day_{day}" for day in range(3)]
    manifest = preprocess(criteo_options(paths, tmp_path / "out", max_ids=20, rows_per_shard=4096))
    expected, _ = oracle([line for lines in files for line in lines], days_split([3_000, 2_500, 301]), max_ids=20)
    assert_equal_to_oracle(tmp_path / "out", expected)
    assert [info.num_rows for info in manifest.splits["train"].shards] == [4096, 1404]
    assert manifest.split_rule.startswith("days: the last file (301 rows) halved in order")


def test_columns_without_ids_have_a_table_of_the_two_reserved_rows(tmp_path, small_pieces):
    """C3 is empty in all rows, C4 in those that train; of C5 every id is rare."""
    rows = [line.split(b"\t") for line in criteo_lines(420)]
    for number, row in enumerate(rows):
        row[16], row[17], row[18] = b"", b"" if number < 360 else b"ab", b"%x" % number
    lines = [b"\t".join(row) for row in rows]
    (tmp_path / "train.txt").write_bytes(b"\n".join(lines) + b"\n")
    manifest = preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "out", frequency_threshold=2))
    expected, vocabularies = oracle(lines, days_split([420]), threshold=2)
    assert vocabularies[2:5] == [[], [], []]
    assert_equal_to_oracle(tmp_path / "out", expected)
    stats = [manifest.categorical_stats[f"C{c}"] for c in (3, 4, 5)]
    assert [(column.num_embeddings, column.cardinality) for column in stats] == [(2, 0), (2, 1), (2, 420)]


def test_hashed_ids_equal_splitmix64(tmp_path, small_pieces):
    lines = criteo_lines(300)
    (tmp_path / "train.txt").write_bytes(b"\n".join(lines))
    manifest = preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "out", num_buckets=1000))
    expected, _ = oracle(lines, days_split([300]), buckets=1000)
    assert_equal_to_oracle(tmp_path / "out", expected)
    assert manifest.categorical_stats["C1"].num_embeddings == 1000
    assert not (tmp_path / "out" / "vocabulary").exists()


@pytest.mark.parametrize("split", ["random", "fraction"])
def test_random_and_fraction_splits(tmp_path, small_pieces, split):
    lines = criteo_lines(900)
    (tmp_path / "train.txt").write_bytes(b"\n".join(lines) + b"\n")
    options = criteo_options(tmp_path / "train.txt", tmp_path / "out", split=split, seed=3, fractions=(0.6, 0.3, 0.1))
    manifest = preprocess(options)
    counts = [manifest.splits[name].num_rows for name in SPLITS]
    if split == "fraction":
        assert counts == [540, 270, 90]
        split_of = ["train"] * 540 + ["validation"] * 270 + ["test"] * 90
    else:
        assert sum(counts) == 900
        assert all(abs(count - share * 900) < 60 for count, share in zip(counts, (0.6, 0.3, 0.1), strict=True))
        from papilio.data_pipeline.mixing import key_of

        draws = [splitmix64(splitmix64(row) ^ key_of(3, "split")) / 2**64 for row in range(900)]
        split_of = ["train" if draw < 0.6 else "validation" if draw < 0.9 else "test" for draw in draws]
    assert_equal_to_oracle(tmp_path / "out", oracle(lines, split_of)[0])


def test_statistics_of_the_manifest(tmp_path, small_pieces):
    lines = criteo_lines(700)
    (tmp_path / "train.txt").write_bytes(b"\n".join(lines) + b"\n")
    manifest = preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "out", frequency_threshold=3))
    expected, _ = oracle(lines, days_split([700]), threshold=3)
    rows = [row for split in SPLITS for row in expected[split]]
    raw = [line.decode().split("\t") for line in lines]
    dense = np.array([row[1] for row in rows])
    for i in range(13):
        stats = manifest.dense_stats[f"I{i + 1}"]
        assert stats.missing_rate == sum(row[1 + i] == "" for row in raw) / 700
        seen = [stats.mean, stats.standard_deviation, stats.minimum, stats.maximum]
        wanted = [dense[:, i].mean(), dense[:, i].std(), dense[:, i].min(), dense[:, i].max()]
        np.testing.assert_allclose(seen, wanted, rtol=1e-5, atol=1e-7)
    for c in range(26):
        stats = manifest.categorical_stats[f"C{c + 1}"]
        counts = Counter(int(row[14 + c], 16) for row in raw if row[14 + c])
        top = sum(sorted(counts.values(), reverse=True)[: math.ceil(len(counts) / 100)])
        assert stats.cardinality == len(counts)
        assert stats.skew == top / sum(counts.values())
        assert stats.missing_rate == sum(row[14 + c] == "" for row in raw) / 700
        assert stats.unknown_rate == sum(row[2][c] == 0 for row in rows) / 700
        assert stats.mean_ids_per_sample == 1.0


def test_workers_and_compression_change_no_byte(tmp_path):
    text = b"\n".join(criteo_lines(400)) + b"\n"
    for suffix, data in {
        "": text,
        ".gz": gzip.compress(text[:1000]) + gzip.compress(text[1000:]),
        ".zst": zstandard.compress(text[:1000]) + zstandard.compress(text[1000:]),
    }.items():
        (tmp_path / f"train.txt{suffix}").write_bytes(data)
    outputs = []
    for number, (suffix, workers) in enumerate([("", 1), ("", 2), (".gz", 1), (".zst", 1)]):
        preprocess(criteo_options(tmp_path / f"train.txt{suffix}", tmp_path / f"out{number}", num_workers=workers))
        outputs.append(all_bytes(tmp_path / f"out{number}"))
    assert outputs[0] == outputs[1]
    for output in outputs[2:]:
        manifests = [
            json.loads(files.pop(MANIFEST_NAME)) | {"source": None, "crc32": None}
            for files in (dict(outputs[0]), output)
        ]
        assert manifests[0] == manifests[1]
        assert output == {name: data for name, data in outputs[0].items() if name != MANIFEST_NAME}


def test_bad_rows_are_named_or_set_aside(tmp_path, small_pieces):
    lines = criteo_lines(500)
    good = list(lines)
    lines.insert(400, b"1\t2\t3")
    lines.insert(300, lines[300].replace(b"\t", b"\tzz", 1))
    (tmp_path / "train.txt").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(PreprocessError, match=r"train.txt, line 301, field I1: 'zz.*raise --max-bad-rows"):
        preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "out"))
    with pytest.raises(PreprocessError, match=r"line 402, field \(row\): 3 fields.*; 1 malformed rows are allowed"):
        preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "out", max_bad_rows=1))
    manifest = preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "out", max_bad_rows=2))
    assert manifest.num_bad_rows == 2
    assert_equal_to_oracle(tmp_path / "out", oracle(good, days_split([500]))[0])
    table = (tmp_path / "out" / "bad_rows.tsv").read_bytes().splitlines()
    assert [row.split(b"\t")[1] for row in table[1:]] == [b"301", b"402"]
    assert table[2].endswith(b"\t1\t2\t3")


def test_inputs_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(PreprocessError, match=r"empty is empty \(0 bytes\)"):
        preprocess(criteo_options(tmp_path / "empty", tmp_path / "out"))
    with pytest.raises(PreprocessError, match="absent does not exist"):
        preprocess(criteo_options(tmp_path / "absent", tmp_path / "out"))
    text = b"\n".join(criteo_lines(500)) + b"\n"
    for name, data, message in [
        ("cut.gz", gzip.compress(text)[:-2000], "cut.gz is truncated"),
        ("cut.zst", zstandard.compress(text)[:-2000], "cut.zst is truncated"),
        ("plain.gz", text, "plain.gz is damaged or not what its name says"),
        ("plain.zst", text, "plain.zst is damaged or not what its name says"),
        ("none.gz", gzip.compress(b""), "none.gz holds no text"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(PreprocessError, match=message):
            preprocess(criteo_options(tmp_path / name, tmp_path / f"out_{name}"))


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(byte_blocks.read_blocks, "__defaults__", (1_000,))
    (tmp_path / "long").write_bytes(b"a" * 5_000)
    with pytest.raises(PreprocessError, match="long has no line end within 1000 bytes"):
        preprocess(criteo_options(tmp_path / "long", tmp_path / "out"))


def test_a_log_gets_lines_that_say_how_far_it_is(tmp_path, caplog):
    (tmp_path / "train.txt").write_bytes(b"\n".join(criteo_lines(50)) + b"\n")
    with caplog.at_level("INFO"):
        preprocess(criteo_options(tmp_path / "train.txt", tmp_path / "out", show_progress=True))
    stages = [record.message.split(":")[0] for record in caplog.records]
    assert stages == ["reading", "vocabularies", "writing"]
    assert "50 of 50 rows" in caplog.records[2].message


def test_inputs_come_from_any_iopath_scheme(tmp_path):
    class Shelf(PathHandler):
        def _get_supported_prefixes(self):
            return ["shelf://"]

        def _isfile(self, path, **kwargs):
            return self._local(path).is_file()

        def _open(self, path, mode="r", buffering=-1, **kwargs):
            return self._local(path).open(mode)

        def _local(self, path):
            return tmp_path / path.removeprefix("shelf://")

    if "shelf://" not in path_manager._path_handlers:
        path_manager.register_handler(Shelf())
    lines = criteo_lines(50)
    (tmp_path / "train.txt").write_bytes(b"\n".join(lines) + b"\n")
    options = criteo_options(tmp_path, tmp_path / "out", num_workers=2)
    preprocess(options.model_copy(update={"inputs": ("shelf://train.txt",)}))
    assert_equal_to_oracle(tmp_path / "out", oracle(lines, days_split([50]))[0])


def test_preprocessing_imports_no_torch():
    script = "import sys, papilio.data_pipeline.preprocess.engine; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(byte_blocks.__file__).parents[3])}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0


def test_options_import_neither_pyarrow_nor_numpy():
    script = "import sys, papilio.data_pipeline.preprocess.preprocess_options as _; "
    script += "sys.exit(any(m in sys.modules for m in ('pyarrow', 'numpy')))"
    environment = os.environ | {"PYTHONPATH": str(Path(byte_blocks.__file__).parents[3])}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0
