import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from papilio.data_pipeline.manifest import DatasetError, ShardInfo
from papilio.data_pipeline.schema import CategoricalColumn, DenseColumn, Schema
from papilio.data_pipeline.shards import Bags, Columns, file_crc32, open_shard, write_shard

SCHEMA = Schema(
    dense=(DenseColumn(name="a"), DenseColumn(name="b")),
    categorical=(CategoricalColumn(name="u"), CategoricalColumn(name="m", multi_hot=True)),
)
COLUMNS = Columns(
    labels=np.array([0, 1, 1], np.uint8),
    dense=np.arange(6, dtype=np.float32).reshape(3, 2),
    bags=(
        Bags(np.array([3, 1, 2], np.int32)),
        Bags(np.array([5, 6, 7], np.int32), np.array([0, 0, 2, 3], np.int32)),
    ),
)


def _write(folder: Path) -> ShardInfo:
    return write_shard(COLUMNS, SCHEMA, str(folder), "train/0.arrow")


def test_shard_is_a_plain_arrow_file_with_size_and_checksum_known(tmp_path: Path) -> None:
    info = _write(tmp_path)
    content = (tmp_path / "train/0.arrow").read_bytes()
    assert (info.num_rows, info.num_bytes, info.crc32) == (3, len(content), zlib.crc32(content))
    assert file_crc32(str(tmp_path / "train/0.arrow")) == info.crc32
    table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
    assert table.to_pydict() == {
        "label": [0, 1, 1],
        "dense": [[0, 1], [2, 3], [4, 5]],
        "id:u": [3, 1, 2],
        "id:m": [[], [5, 6], [7]],
    }
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["0.arrow"]


def test_writing_again_replaces_an_older_shard(tmp_path: Path) -> None:
    _write(tmp_path)
    other = Columns(np.array([1, 1, 1], np.uint8), COLUMNS.dense, COLUMNS.bags)
    info = write_shard(other, SCHEMA, str(tmp_path), "train/0.arrow")
    assert open_shard(info, SCHEMA, str(tmp_path)).labels.tolist() == [1, 1, 1]


def test_open_shard_maps_the_columns_without_copying(tmp_path: Path) -> None:
    columns = open_shard(_write(tmp_path), SCHEMA, str(tmp_path))
    assert columns.num_rows == 3
    assert columns.labels.tolist() == [0, 1, 1]
    assert columns.dense.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert columns.bags[0].ids.tolist() == [3, 1, 2]
    assert columns.bags[0].offsets is None
    assert columns.bags[1].ids.tolist() == [5, 6, 7]
    assert columns.bags[1].offsets is not None
    assert columns.bags[1].offsets.tolist() == [0, 0, 2, 3]
    assert not columns.dense.flags.owndata
    assert not columns.dense.flags.writeable


def test_schema_without_dense_columns_and_no_rows_at_all(tmp_path: Path) -> None:
    schema = Schema(categorical=SCHEMA.categorical)
    none = np.empty(0, np.int32)
    empty = Columns(
        np.empty(0, np.uint8), np.empty((0, 0), np.float32), (Bags(none), Bags(none, np.zeros(1, np.int32)))
    )
    columns = open_shard(write_shard(empty, schema, str(tmp_path), "0.arrow"), schema, str(tmp_path))
    assert columns.num_rows == 0
    assert columns.dense.shape == (0, 0)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    info = _write(tmp_path)
    (tmp_path / "train/0.arrow").unlink()
    with pytest.raises(DatasetError, match=r"train/0\.arrow is missing"):
        open_shard(info, SCHEMA, str(tmp_path))


def test_cut_shard_is_refused_by_its_size(tmp_path: Path) -> None:
    info = _write(tmp_path)
    path = tmp_path / "train/0.arrow"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DatasetError, match=f"has {info.num_bytes - 10} bytes, the manifest says {info.num_bytes}"):
        open_shard(info, SCHEMA, str(tmp_path))


def test_changed_shard_is_refused_by_its_checksum(tmp_path: Path) -> None:
    info = _write(tmp_path)
    path = tmp_path / "train/0.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"train/0\.arrow was changed after it was written \(checksum differs"):
        open_shard(info, SCHEMA, str(tmp_path))


def test_shard_of_other_columns_is_refused(tmp_path: Path) -> None:
    info = _write(tmp_path)
    other = Schema(dense=SCHEMA.dense, categorical=(CategoricalColumn(name="v"),))
    with pytest.raises(
        DatasetError, match=r"does not hold the columns of the manifest .column id:v is missing, not int32"
    ):
        open_shard(info, other, str(tmp_path))
    other = Schema(dense=SCHEMA.dense, categorical=(CategoricalColumn(name="u", multi_hot=True),))
    with pytest.raises(DatasetError, match="column id:u is int32, not list<item: int32>"):
        open_shard(info, other, str(tmp_path))


def test_shard_of_another_number_of_dense_columns_is_refused(tmp_path: Path) -> None:
    info = _write(tmp_path)
    other = Schema(dense=(*SCHEMA.dense, DenseColumn(name="c")), categorical=SCHEMA.categorical)
    with pytest.raises(DatasetError, match=r"column dense is fixed_size_list.*\[2\], not .*\[3\]"):
        open_shard(info, other, str(tmp_path))


def test_file_that_is_not_arrow_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.arrow").write_bytes(b"not arrow at all")
    info = ShardInfo(file="x.arrow", num_rows=1, num_bytes=16, crc32=zlib.crc32(b"not arrow at all"))
    with pytest.raises(DatasetError, match="does not hold the columns of the manifest"):
        open_shard(info, SCHEMA, str(tmp_path))
