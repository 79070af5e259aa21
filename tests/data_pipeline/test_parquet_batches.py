"""Memory is bounded in bytes: blocks of Parquet and of text, and shards, are counted, whatever is in a row."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import parquet_batches
from data_pipeline.parquet_batches import batch_bytes, read_batches

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
