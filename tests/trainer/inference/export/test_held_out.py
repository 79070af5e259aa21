"""Held-out samples in blocks, against the shards as they are."""

import numpy as np
import pytest

from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.manifest import DatasetError
from papilio.trainer.inference.export import held_out
from papilio.trainer.inference.export.held_out import MAX_GATE_SAMPLES, HeldOut
from tests.support.datasets import write_dataset


def samples_of(dataset, split):
    """Every sample as (label, dense, bags), in order, straight from the shards."""
    rows = dataset.open_split(split)
    for number in range(len(dataset.manifest.splits[split].shards)):
        shard = rows.shard(number)
        for row in range(shard.num_rows):
            bags = [
                [bag.ids[row]] if bag.offsets is None else list(bag.ids[bag.offsets[row] : bag.offsets[row + 1]])
                for bag in shard.bags
            ]
            yield int(shard.labels[row]), shard.dense[row].tolist(), bags


def samples_in(block):
    """The same of a block, whose ids lie feature after feature."""
    lengths = block.lengths.numpy().reshape(3, -1)
    ends = np.cumsum(lengths.ravel())
    bags = [list(part) for part in np.split(block.ids.numpy(), ends[:-1])]
    size = len(block.labels)
    for row in range(size):
        yield (
            int(block.labels[row]),
            block.dense[row].tolist(),
            [[int(i) for i in bags[feature * size + row]] for feature in range(3)],
        )


def as_lists(samples):
    return [(label, dense, [[int(i) for i in bag] for bag in bags]) for label, dense, bags in samples]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset(write_dataset(tmp_path_factory.mktemp("data")))


@pytest.mark.parametrize("block_rows", [7, 20, 60, 100])
def test_blocks_hold_every_sample_once_and_in_order(dataset, monkeypatch, block_rows):
    monkeypatch.setattr(held_out, "BLOCK_ROWS", block_rows)
    found = HeldOut(dataset, "test")
    blocks = list(found.blocks())
    assert [len(block.labels) for block in blocks] == [min(block_rows, 60 - at) for at in range(0, 60, block_rows)]
    assert as_lists(s for block in blocks for s in samples_in(block)) == as_lists(samples_of(dataset, "test"))
    assert found.num_samples == found.num_rows == 60


def test_some_samples_are_blocks_spread_over_the_split(dataset, monkeypatch):
    monkeypatch.setattr(held_out, "BLOCK_ROWS", 10)
    found = HeldOut(dataset, "validation", max_samples=25)
    whole = as_lists(samples_of(dataset, "validation"))
    expected = whole[0:10] + whole[30:40] + whole[60:70]
    assert as_lists(s for block in found.blocks() for s in samples_in(block)) == expected
    assert (found.num_samples, found.num_rows) == (30, 90)
    assert found.describe() == f"30 of 90 samples of split validation of {dataset.folder}"


def test_the_gate_takes_test_and_the_search_validation(tmp_path, dataset):
    assert HeldOut.for_gate(dataset) == HeldOut(dataset, "test", MAX_GATE_SAMPLES)
    assert HeldOut.for_search(dataset) == HeldOut(dataset, "validation", MAX_GATE_SAMPLES)
    only = open_dataset(write_dataset(tmp_path, split_rows={"train": 6, "validation": 6}))
    assert HeldOut.for_gate(only).split == "validation"


def test_a_data_set_with_nothing_held_out_is_refused(tmp_path):
    dataset = open_dataset(write_dataset(tmp_path, split_rows={"train": 6}))
    message = r"has no rows in a test or validation split, .* name a data set that has \(--data DIR\)"
    for choose in (HeldOut.for_gate, HeldOut.for_search):
        with pytest.raises(DatasetError, match=message):
            choose(dataset)
