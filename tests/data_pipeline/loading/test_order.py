import itertools

import numpy as np
import pytest

from papilio.data_pipeline.loading.order import (
    EpochOrder,
    ReadPosition,
    Runs,
    batch_range,
    num_batches,
    permute,
    rank_range,
)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 99, 100, 101, 1000, 4099])
def test_permute_is_a_bijection_and_each_index_stands_alone(size: int) -> None:
    images = permute(np.arange(size), size, key=7)
    assert sorted(images) == list(range(size))
    assert [permute(np.array([i]), size, key=7)[0] for i in range(0, size, 37)] == list(images[::37])


def test_permute_reaches_every_permutation_of_four_about_equally() -> None:
    seen = [tuple(permute(np.arange(4), 4, key)) for key in range(4800)]
    counts = [seen.count(order) for order in itertools.permutations(range(4))]
    # 24 orders, 200 expected each, standard deviation 14; Feistel with six rounds is not exactly uniform.
    assert min(counts) > 100
    assert max(counts) < 320


def test_permute_scatters_neighbours() -> None:
    images = permute(np.arange(10_000), 10_000, key=1)
    assert abs(np.corrcoef(images, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.05


@pytest.mark.parametrize("num_rows", [0, 1, 2, 63, 64, 65, 127, 128, 640, 1000])
@pytest.mark.parametrize("block_rows", [1, 2, 64, 300])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_comes_once_for_any_cut(num_rows: int, block_rows: int, shuffle: bool) -> None:
    for epoch in range(2):
        order = EpochOrder(num_rows, seed=5, epoch=epoch, shuffle=shuffle, block_rows=block_rows)
        whole = order.rows_of(0, num_rows).rows
        assert sorted(whole) == list(range(num_rows))
        for step in (7, 64, 100):
            cut = [order.rows_of(a, min(a + step, num_rows)).rows for a in range(0, num_rows, step)]
            assert np.array_equal(np.concatenate([np.empty(0, np.int64), *cut]), whole)


def test_unshuffled_order_is_that_of_the_rows() -> None:
    assert list(EpochOrder(100, seed=0, epoch=3, shuffle=False).rows_of(10, 20).rows) == list(range(10, 20))


def test_blocks_stay_whole_and_the_rest_moves() -> None:
    places = set()
    for epoch in range(30):
        rows = EpochOrder(67, seed=1, epoch=epoch, block_rows=8).rows_of(0, 67).rows
        place = int(np.flatnonzero(rows == 64)[0])
        assert list(rows[place : place + 3]) == [64, 65, 66]
        others = np.delete(rows, [place, place + 1, place + 2]).reshape(8, 8)
        assert (others == others[:, :1] + np.arange(8)).all()
        places.add(place)
    assert len(places) > 5


def test_seeds_and_epochs_give_other_orders_and_the_same_ones_again() -> None:
    def rows(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(EpochOrder(1000, seed=seed, epoch=epoch, block_rows=10).rows_of(0, 1000).rows)

    assert len({rows(seed, epoch) for seed in (0, 1, 2, -1, 2**64) for epoch in (0, 1, 2)}) == 15
    assert rows(3, 4) == rows(3, 4)


def test_order_is_the_same_in_every_release() -> None:
    # Changing these numbers breaks the resuming of runs: bump the checkpoint's version if it must be.
    order = EpochOrder(10, seed=1, epoch=2, block_rows=1)
    assert list(order.rows_of(0, 10).rows) == [9, 5, 2, 1, 0, 6, 4, 7, 8, 3]


def test_rows_of_refuses_places_outside_the_epoch() -> None:
    with pytest.raises(ValueError, match="places 5 to 11 are not within the 10 rows"):
        EpochOrder(10, seed=0, epoch=0).rows_of(5, 11)


def test_runs_expand_to_rows() -> None:
    assert list(Runs(np.array([10, 3]), np.array([3, 2])).rows) == [10, 11, 12, 3, 4]


def test_batches_cover_an_epoch_and_a_changed_batch_size_falls_into_step() -> None:
    assert num_batches(10, 4) == 3
    assert [batch_range(s, 10, 4) for s in (0, 4, 8)] == [(0, 4), (4, 8), (8, 10)]
    assert batch_range(6, 10, 4) == (6, 8)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_a_batch_in_contiguous_parts(world_size: int) -> None:
    for start, stop in ((0, 0), (5, 6), (10, 17), (0, 64)):
        parts = [rank_range(start, stop, rank, world_size) for rank in range(world_size)]
        assert [row for a, b in parts for row in range(a, b)] == list(range(start, stop))
        sizes = [b - a for a, b in parts]
        assert max(sizes) - min(sizes) <= 1


def test_position_survives_its_dict() -> None:
    assert ReadPosition.from_dict(ReadPosition(2, 77).to_dict()) == ReadPosition(2, 77)
    assert ReadPosition() == ReadPosition(epoch=0, sample=0)
