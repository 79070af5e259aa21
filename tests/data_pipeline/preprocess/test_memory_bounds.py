"""Memory is bounded in bytes: blocks of Parquet and of text, and shards, are counted, whatever is in a row."""

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.manifest import read_manifest
from papilio.data_pipeline.preprocess import byte_blocks, parquet_batches, shard_stage
from papilio.data_pipeline.preprocess.bad_rows import PreprocessError
from papilio.data_pipeline.preprocess.byte_blocks import read_blocks
from papilio.data_pipeline.preprocess.engine import preprocess
from papilio.data_pipeline.preprocess.parquet_batches import batch_bytes, read_batches
from papilio.data_pipeline.preprocess.preprocess_options import PreprocessOptions

BATCH_BYTES = 20_000


def long_bags(lengths: list[int]) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.arange(offsets[-1]) % 1_000))


TABLES = {
    "bags": {"ids": long_bags([300] * 400)},
    "few long bags": {"ids": long_bags([1] * 200 + [2_000] * 20 + [0] * 180)},
    "a bag longer than a block": {"ids": long_bags([1] * 100 + [9_000] + [1] * 299)},
    "strings": {"text": pa.array([f"{row % 3}" * 900 for row in range(400)])},
    "a dictionary": {"text": pa.array(["x" * 15_000, "y"] * 200).dictionary_encode()},
    "numbers": {"a": pa.array(range(400)), "b": pa.array(range(400))},
}


@pytest.mark.parametrize("name", TABLES)
def test_batches_are_bounded_in_bytes_and_lose_no_row(tmp_path, monkeypatch, name):
    monkeypatch.setattr(parquet_batches, "BATCH_BYTES", BATCH_BYTES)
    table = pa.table(TABLES[name])
    pq.write_table(table, tmp_path / "data.parquet", row_group_size=150)
    batches = list(read_batches(pq.ParquetFile(tmp_path / "data.parquet", buffer_size=4_096), table.column_names))
    assert pa.Table.from_batches(batches).to_pydict() == table.to_pydict()
    for before, batch in zip([None, *batches], batches, strict=False):
        assert batch_bytes(batch) <= BATCH_BYTES or batch.num_rows == 1
        # No smaller than needed: two neighbours do not fit into one.
        assert before is None or batch_bytes(before) + batch_bytes(batch) > BATCH_BYTES // 4


def test_batches_are_bounded_in_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_batches, "BATCH_ROWS", 300)
    pq.write_table(pa.table(TABLES["numbers"]), tmp_path / "data.parquet")
    batches = read_batches(pq.ParquetFile(tmp_path / "data.parquet"), ["b"])
    assert [(batch.num_rows, batch.schema.names) for batch in batches] == [(256, ["b"]), (144, ["b"])]


def test_few_rows_are_decoded_at_once_where_bags_are_long(tmp_path, monkeypatch):
    pq.write_table(pa.table({"ids": long_bags([5_000] * 40)}), tmp_path / "data.parquet", compression="none")
    monkeypatch.setattr(parquet_batches, "BATCH_BYTES", 200_000)
    # 5,000 ids of 8 bytes in a row.
    assert parquet_batches.rows_at_once(pq.ParquetFile(tmp_path / "data.parquet").metadata.row_group(0)) == 5


@pytest.mark.parametrize("is_stream", [False, True])
def test_blocks_of_text_with_bags_are_smaller_but_for_a_longer_line(tmp_path, is_stream):
    lines = [b"x" * length + b"\n" for length in (10, 20, 70, 5, 5, 5, 60, 30, 80)]
    path = tmp_path / ("text.gz" if is_stream else "text")
    path.write_bytes(gzip.compress(b"".join(lines)) if is_stream else b"".join(lines))
    found = list(read_blocks(str(path), 90, part=2))
    assert [offset for offset, _, _ in found] == [0, 32, 121, 182, 213]
    assert [length for _, length, _ in found] == [32, 71 + 18, 61, 31, 81]
    with pytest.raises(PreprocessError, match="no line end within 40 bytes"):
        list(read_blocks(str(path), 40, part=2))


@pytest.mark.parametrize("split", ["fraction", "random"])
def test_shards_are_bounded_in_bytes(tmp_path, monkeypatch, split):
    """The cuts are those of a greedy loop over single rows, whatever the blocks were."""
    monkeypatch.setattr(shard_stage, "SHARD_BYTES", 1_000)
    lengths = np.random.default_rng(0).integers(0, 60, 700)
    lengths[50] = 900
    text = "".join(f"{i % 2},{i},{' '.join(['7'] * n)}\n" for i, n in enumerate(lengths))
    (tmp_path / "data.csv").write_text("label,age,user\n" + text)
    (tmp_path / "schema.toml").write_text('dense=[{name="age"}]\ncategorical=[{name="user", multi_hot=true}]')
    found = []
    for number, block_bytes in enumerate([1 << 20, 7_000]):
        monkeypatch.setattr(byte_blocks.read_blocks, "__defaults__", (block_bytes,))
        words = {"inputs": (f"{tmp_path}/data.csv",), "schema_path": f"{tmp_path}/schema.toml", "num_workers": 1}
        output = f"{tmp_path}/out{number}"
        preprocess(PreprocessOptions(source="table", output=output, split=split, show_progress=False, **words))
        found.append(read_manifest(output))
    assert found[0].splits == found[1].splits
    train = open_dataset(output).open_split("train")
    rows = np.concatenate([np.diff(train.shard(i).bags[0].offsets) for i in range(len(train.info.shards))])
    if split == "fraction":
        assert rows.tolist() == lengths[:560].tolist()
    sizes, held = [0], 0
    for length in rows:
        num_bytes = 1 + 4 + 4 + 4 * int(length)
        if sizes[-1] and held + num_bytes > 1_000:
            sizes.append(0)
            held = 0
        sizes[-1] += 1
        held += num_bytes
    assert [shard.num_rows for shard in train.info.shards] == sizes
