import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from papilio.data_pipeline.config import DataConfig
from papilio.data_pipeline.dataset import Dataset, open_dataset
from papilio.data_pipeline.loading.batch import Batch
from papilio.data_pipeline.loading.loader import Loader
from papilio.data_pipeline.loading.order import ReadPosition
from papilio.data_pipeline.loading.prefetch import prefetch
from papilio.data_pipeline.manifest import CategoricalStats, DatasetError, Manifest, SplitInfo, write_manifest
from papilio.data_pipeline.schema import CategoricalColumn, DenseColumn, Schema
from papilio.data_pipeline.shards import Bags, Columns, write_shard

Sample = tuple[float, tuple[float, ...], tuple[tuple[int, ...], ...]]
NUM_ROWS = 103


def _bags_of_row(row: int, multi_hot: bool) -> tuple[tuple[int, ...], ...]:
    tags = tuple((row * 7 + k) % 50 for k in range(row % 4)) if multi_hot else (row % 50,)
    return (row,), tags, (row % 3,)


def _sample(row: int, multi_hot: bool) -> Sample:
    return float(row % 2), (row / 4, -float(row)), _bags_of_row(row, multi_hot)


def _schema(multi_hot: bool) -> Schema:
    return Schema(
        dense=(DenseColumn(name="a"), DenseColumn(name="b")),
        categorical=(
            CategoricalColumn(name="row"),
            CategoricalColumn(name="tags", multi_hot=multi_hot),
            CategoricalColumn(name="third"),
        ),
    )


def _columns(rows: range, multi_hot: bool) -> Columns:
    samples = [_sample(row, multi_hot) for row in rows]
    bags = []
    for feature in range(3):
        lists = [sample[2][feature] for sample in samples]
        ids = np.array([i for found in lists for i in found], np.int32)
        offsets = np.cumsum([0, *map(len, lists)]).astype(np.int32)
        bags.append(Bags(ids, offsets if multi_hot and feature == 1 else None))
    return Columns(
        np.array([sample[0] for sample in samples], np.uint8),
        np.array([sample[1] for sample in samples], np.float32).reshape(-1, 2),
        tuple(bags),
    )


def _write(
    folder: Path, multi_hot: bool = False, cuts: tuple[int, ...] = (0, 50, 50, 90, NUM_ROWS), limit: int = 50
) -> str:
    schema = _schema(multi_hot)
    shards = tuple(
        write_shard(_columns(range(start, stop), multi_hot), schema, str(folder), f"train/{i}.arrow")
        for i, (start, stop) in enumerate(itertools.pairwise(cuts))
    )

    def stats(num_embeddings: int) -> CategoricalStats:
        rates: dict[str, Any] = dict.fromkeys(("missing_rate", "unknown_rate", "mean_ids_per_sample", "skew"), 0.0)
        return CategoricalStats(num_embeddings=num_embeddings, cardinality=0, **rates)

    manifest = Manifest(
        papilio_version="0",
        data_schema=schema,
        split_rule="none",
        splits={
            "train": SplitInfo(num_rows=cuts[-1], num_positives=0, shards=shards),
            "test": SplitInfo(num_rows=0, num_positives=0, shards=()),
        },
        dense_stats={},
        categorical_stats={"row": stats(1000), "tags": stats(limit), "third": stats(3)},
        source={},
    )
    write_manifest(manifest, str(folder))
    return str(folder)


@pytest.fixture(params=[False, True], ids=["one_hot", "multi_hot"])
def multi_hot(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def dataset(tmp_path: Path, multi_hot: bool) -> Dataset:
    return open_dataset(_write(tmp_path, multi_hot))


def _loader(dataset: Dataset, *, block_rows: int = 8, prefetch_batches: int = 2, **options: Any) -> Loader:
    config = DataConfig(path=dataset.folder, shuffle_block_rows=block_rows, prefetch_batches=prefetch_batches)
    return Loader(dataset, "train", config, **{"global_batch_size": 20, "seed": 3, **options})


def _samples(batch: Batch) -> list[Sample]:
    """Read a batch back sample by sample, through torchrec's own accessors."""
    by_key = batch.sparse_features.to_dict()
    lists = [by_key[key].to_dense() for key in ("row", "tags", "third")]
    return [
        (label, tuple(dense), tuple(tuple(feature[i].tolist()) for feature in lists))
        for i, (label, dense) in enumerate(zip(batch.labels.tolist(), batch.dense_features.tolist(), strict=True))
    ][: batch.num_samples]


def _rows(batch: Batch) -> list[int]:
    return [int(sample[2][0][0]) for sample in _samples(batch)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("block_rows", [1, 8, 64])
def test_an_epoch_holds_every_sample_once_and_whole(
    dataset: Dataset, multi_hot: bool, shuffle: bool, block_rows: int
) -> None:
    batches = list(_loader(dataset, shuffle=shuffle, block_rows=block_rows))
    assert [len(batch.labels) for batch in batches] == [20, 20, 20, 20, 20, 3]
    assert [batch.global_batch_size for batch in batches] == [20, 20, 20, 20, 20, 3]
    samples = [sample for batch in batches for sample in _samples(batch)]
    expected = [_sample(row, multi_hot) for row in range(NUM_ROWS)]
    assert (sorted(samples) if shuffle else samples) == (sorted(expected) if shuffle else expected)


def test_batches_have_the_dtypes_of_the_kernels(dataset: Dataset) -> None:
    batch = next(iter(_loader(dataset)))
    sparse = batch.sparse_features
    assert (batch.dense_features.dtype, batch.labels.dtype) == (torch.float32, torch.float32)
    assert (sparse.values().dtype, sparse.lengths().dtype) == (torch.int32, torch.int32)
    assert sparse.keys() == ["row", "tags", "third"]
    assert sparse.stride() == 20
    sums = sparse.lengths().view(3, 20).sum(1).tolist()
    assert sparse.length_per_key() == sums
    assert sparse.offset_per_key() == [0, *np.cumsum(sums).tolist()]


@pytest.mark.parametrize("world_size", [2, 3, 8, 30])
def test_ranks_share_the_global_batches_of_one_rank(dataset: Dataset, world_size: int) -> None:
    whole = [sorted(_rows(batch)) for batch in _loader(dataset)]
    ranks = [list(_loader(dataset, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {6}
    for g, expected in enumerate(whole):
        slices = [_rows(batches[g]) for batches in ranks]
        assert sorted(row for part in slices for row in part) == expected
        assert max(map(len, slices)) - min(map(len, slices)) <= 1
        assert {batches[g].position for batches in ranks} == {ranks[0][g].position}
        assert {batches[g].global_batch_size for batches in ranks} == {len(expected)}


def test_all_ranks_slices_have_one_size_and_a_short_one_is_padded(dataset: Dataset) -> None:
    last = [list(_loader(dataset, rank=rank, world_size=30))[-1] for rank in range(30)]
    assert sum(batch.num_samples for batch in last) == 3
    for batch in last:
        assert (batch.labels.shape, batch.dense_features.shape) == ((1,), (1, 2))
        assert batch.sparse_features.stride() == 1
        assert batch.global_batch_size == 3
        if batch.num_samples == 0:
            assert batch.sparse_features.values().numel() == 0
            assert batch.sparse_features.lengths().tolist() == [0, 0, 0]


@pytest.mark.parametrize("num_done", [0, 1, 5, 6, 7, 12])
def test_reading_goes_on_where_a_position_says(dataset: Dataset, num_done: int) -> None:
    whole = list(_loader(dataset, num_epochs=2))
    assert len(whole) == 12
    position = whole[num_done - 1].position if num_done else None
    loader = _loader(dataset, num_epochs=2, start=position)
    rest = list(loader)
    assert len(loader) == len(rest) == 12 - num_done
    assert [_samples(batch) for batch in rest] == [_samples(batch) for batch in whole[num_done:]]
    assert [batch.position for batch in rest] == [batch.position for batch in whole[num_done:]]


def test_positions_count_samples_and_pass_into_the_next_epoch(dataset: Dataset) -> None:
    positions = [batch.position for batch in _loader(dataset, global_batch_size=60, num_epochs=2)]
    assert positions == [ReadPosition(0, 60), ReadPosition(1, 0), ReadPosition(1, 60), ReadPosition(2, 0)]


def test_a_changed_batch_size_loses_and_repeats_nothing(dataset: Dataset) -> None:
    before = next(iter(_loader(dataset)))
    loader = _loader(dataset, global_batch_size=50, start=before.position)
    rest = list(loader)
    assert [len(batch.labels) for batch in rest] == [30, 50, 3]
    assert len(loader) == 3
    assert sorted(_rows(before) + [row for batch in rest for row in _rows(batch)]) == list(range(NUM_ROWS))


def test_each_iteration_starts_anew_and_epochs_differ(dataset: Dataset) -> None:
    loader = _loader(dataset)
    first, second = ([_rows(batch) for batch in loader] for _ in range(2))
    assert first == second
    both = [_rows(batch) for batch in _loader(dataset, num_epochs=2)]
    assert both[:6] == first
    assert both[6:] != first


def test_batches_handed_out_stay_as_they_were(dataset: Dataset) -> None:
    kept = list(_loader(dataset, prefetch_batches=1))
    assert [_samples(batch) for batch in kept] == [_samples(batch) for batch in _loader(dataset, prefetch_batches=0)]


def _prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "papilio-prefetch"]


def test_stopping_early_leaves_no_thread(dataset: Dataset) -> None:
    loader = _loader(dataset, prefetch_batches=1, num_epochs=1000)
    batches = iter(loader)
    next(batches)
    assert len(_prefetch_threads()) == 1
    batches.close()
    assert _prefetch_threads() == []
    for _ in loader:
        break
    assert _prefetch_threads() == []


def test_waiting_is_counted_anew_in_each_iteration(dataset: Dataset) -> None:
    loader = _loader(dataset)
    assert loader.wait_s == 0
    list(loader)
    assert loader.wait_s > 0
    batches = iter(loader)
    next(batches)
    batches.close()


def test_an_error_in_the_thread_reaches_the_consumer_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise DatasetError("the shard is gone")

    items = prefetch(source(), 4)
    assert next(items) == 1
    with pytest.raises(DatasetError, match="the shard is gone"):
        next(items)
    assert _prefetch_threads() == []


def test_changed_shard_is_refused_while_reading(dataset: Dataset) -> None:
    path = Path(dataset.folder) / "train/2.arrow"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"train/2\.arrow was changed after it was written"):
        list(_loader(dataset))


@pytest.mark.parametrize("bad_id", [-1, 3, 2**31 - 1])
def test_id_outside_its_table_is_refused_by_place(tmp_path: Path, bad_id: int) -> None:
    folder = _write(tmp_path)
    manifest = open_dataset(folder).manifest
    columns = _columns(range(50, 90), multi_hot=False)
    ids = columns.bags[2].ids.copy()
    ids[7] = bad_id
    changed = Columns(columns.labels, columns.dense, (*columns.bags[:2], Bags(ids)))
    info = write_shard(changed, manifest.data_schema, folder, "train/2.arrow")
    shards = manifest.splits["train"].shards
    split = manifest.splits["train"].model_copy(update={"shards": (*shards[:2], info, shards[3])})
    write_manifest(manifest.model_copy(update={"splits": {"train": split}}), folder)
    message = rf"train/2\.arrow, column third, row 7: id {bad_id} is not within \[0, 3\), the column's num_embeddings"
    with pytest.raises(DatasetError, match=message):
        list(_loader(open_dataset(folder)))


def test_multi_hot_id_outside_its_table_names_the_sample_row(tmp_path: Path) -> None:
    # Row r has r % 4 tags from r * 7 % 50 on: tag 49 first comes at row 7.
    with pytest.raises(DatasetError, match=r"train/0\.arrow, column tags, row 7: id 49 is not within \[0, 49\)"):
        list(_loader(open_dataset(_write(tmp_path, multi_hot=True, limit=49)), shuffle=False))


def test_split_without_rows_is_refused(dataset: Dataset) -> None:
    config = DataConfig(path=dataset.folder)
    for name in ("test", "tset"):
        with pytest.raises(DatasetError, match=f"no rows in split '{name}'; splits with rows: train"):
            Loader(dataset, name, config, global_batch_size=2)


def test_position_beyond_the_data_is_refused(dataset: Dataset) -> None:
    with pytest.raises(
        DatasetError, match=r"cannot continue at sample 104 of epoch 1: split 'train' .* has 103 samples"
    ):
        _loader(dataset, start=ReadPosition(1, 104))


def test_shards_that_do_not_add_up_are_refused(dataset: Dataset) -> None:
    manifest = dataset.manifest
    split = manifest.splits["train"].model_copy(update={"num_rows": 104})
    write_manifest(manifest.model_copy(update={"splits": {"train": split}}), dataset.folder)
    with pytest.raises(DatasetError, match="shards of split 'train' hold 103 rows, the split is said to have 104"):
        _loader(open_dataset(dataset.folder))


def test_shard_with_other_rows_than_the_manifest_says_is_refused(dataset: Dataset) -> None:
    manifest = dataset.manifest
    first, *others = manifest.splits["train"].shards
    shards = (first.model_copy(update={"num_rows": 51}), *others)
    split = manifest.splits["train"].model_copy(update={"num_rows": 104, "shards": shards})
    write_manifest(manifest.model_copy(update={"splits": {"train": split}}), dataset.folder)
    with pytest.raises(DatasetError, match=r"train/0\.arrow holds 50 rows, the manifest says 51"):
        list(_loader(open_dataset(dataset.folder)))


def test_manifest_without_statistics_of_a_column_is_refused(dataset: Dataset) -> None:
    stats = {name: found for name, found in dataset.manifest.categorical_stats.items() if name != "tags"}
    write_manifest(dataset.manifest.model_copy(update={"categorical_stats": stats}), dataset.folder)
    with pytest.raises(DatasetError, match=r"has no statistics of column\(s\) tags"):
        open_dataset(dataset.folder)
