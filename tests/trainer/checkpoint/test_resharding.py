"""A checkpoint of any plan and number of ranks loads into any other: exactly, or as the formula says."""

import logging

import numpy as np
import pytest

from tests.support.checkpoints import load_model, newest, save_model, saved_tensors
from tests.support.clicks import DIM, EVERY_TYPE, optimizer_config, shard_clicks, train_steps
from tests.support.plans import NUM_COLUMN_BLOCKS, SHARDING_TYPES

MIXED = "a type of its own for every table"


def types_of(sharding_type):
    """Sharding types by table."""
    return EVERY_TYPE if sharding_type == MIXED else dict.fromkeys(EVERY_TYPE, sharding_type)


def train_and_save(ranks, folder, optimizer, sharding_types):
    for sharding_type in sharding_types:
        model, optimizers = shard_clicks(ranks, types_of(sharding_type), optimizer_config(optimizer))
        train_steps(ranks, model, optimizers, range(2))
        save_model(ranks, model, optimizers, folder / sharding_type, step=2)


def load_and_save(ranks, folder, optimizer, pairs):
    """Load a checkpoint of each first type into each second one and save it again, as `<first> to <second>`."""
    for source, target in pairs:
        model, optimizers = shard_clicks(ranks, types_of(target), optimizer_config(optimizer))
        load_model(ranks, model, optimizers, folder / source)
        save_model(ranks, model, optimizers, folder / f"{source} to {target}", step=2)


def num_blocks(sharding_type, table):
    return NUM_COLUMN_BLOCKS.get(types_of(sharding_type)[table], 1)


def regrouped(values, num_new):
    """The formula for blocks of equal width: merged by the mean, split by copying. [rows, old] to [rows, new]."""
    whole = np.repeat(values.astype(np.float64), DIM // values.shape[1], axis=1)
    return whole.reshape(len(values), num_new, DIM // num_new).mean(2).astype(values.dtype)


def check_same(found, expected, target):
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        is_row_wise = ".row_wise." in key
        wanted = regrouped(values, num_blocks(target, key.split(".")[1])) if is_row_wise else values
        np.testing.assert_array_equal(found[key], wanted, err_msg=key)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
@pytest.mark.parametrize("pool", ["one_rank", "two_ranks", "four_ranks"])
def test_every_type_loads_into_every_type_on_any_number_of_ranks(request, two_ranks, pool, optimizer, tmp_path):
    """Saved on 2 ranks. Weights and full optimizer states are exact; row-wise ones are, or follow the formula."""
    names = SHARDING_TYPES if optimizer == "rowwise_adagrad" else (MIXED, "grid_shard")
    two_ranks.run(train_and_save, tmp_path, optimizer, names)
    pairs = [(source, target) for source in names for target in names]
    request.getfixturevalue(pool).run(load_and_save, tmp_path, optimizer, pairs)
    saved = {name: saved_tensors(newest(tmp_path / name)) for name in names}
    assert all(np.isfinite(values).all() for tensors in saved.values() for values in tensors.values())
    for source, target in pairs:
        check_same(saved_tensors(newest(tmp_path / f"{source} to {target}")), saved[source], target)


def test_four_ranks_on_two_hosts_save_what_one_loads_and_back(one_rank, four_ranks, tmp_path):
    four_ranks.run(train_and_save, tmp_path, "rowwise_adagrad", [MIXED])
    one_rank.run(load_and_save, tmp_path, "rowwise_adagrad", [(MIXED, "grid_shard")])
    (tmp_path / f"{MIXED} to grid_shard").rename(tmp_path / "on one rank")
    four_ranks.run(load_and_save, tmp_path, "rowwise_adagrad", [("on one rank", MIXED)])
    first, last = (saved_tensors(newest(tmp_path / name)) for name in (MIXED, f"on one rank to {MIXED}"))
    for key, values in first.items():
        table = key.split(".")[1]
        if ".row_wise." in key and num_blocks(MIXED, table) == 2:
            # Through a grid of two blocks nothing is lost; through whole tables the parts would become equal.
            np.testing.assert_array_equal(last[key], values, err_msg=key)
        elif ".row_wise." not in key:
            np.testing.assert_array_equal(last[key], values, err_msg=key)


def losses_after(ranks, folder, sharding_type, optimizer):
    model, optimizers = shard_clicks(ranks, types_of(sharding_type), optimizer_config(optimizer))
    load_model(ranks, model, optimizers, folder)
    return train_steps(ranks, model, optimizers, range(2, 4))


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_training_goes_on_as_it_would_have(two_ranks, tmp_path, optimizer):
    """Whole tables, cut rows and replicas train alike, and so do columns under the same blocks."""
    same = {"table_wise": ("row_wise", "table_row_wise", "data_parallel"), "column_wise": ("grid_shard",)}
    two_ranks.run(train_and_save, tmp_path, optimizer, same)
    for source, targets in same.items():
        expected = two_ranks.run(losses_after, tmp_path / source, source, optimizer)[0]
        for target in targets:
            found = two_ranks.run(losses_after, tmp_path / source, target, optimizer)[0]
            np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=f"{source} to {target}")


def warnings_of_loading(ranks, folder, sharding_type):
    messages = []

    class Listener(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    listener = Listener()
    logging.getLogger("papilio.trainer").addHandler(listener)
    losses_after(ranks, folder, sharding_type, "rowwise_adagrad")
    logging.getLogger("papilio.trainer").removeHandler(listener)
    return messages


def test_other_blocks_of_columns_are_told_and_same_ones_are_not(two_ranks, tmp_path):
    two_ranks.run(train_and_save, tmp_path, "rowwise_adagrad", ["column_wise"])
    first, second = two_ranks.run(warnings_of_loading, tmp_path / "column_wise", "table_wise")
    assert "14 table(s) are cut into other blocks of columns than in the checkpoint (t_mean_column_wise, " in first[0]
    assert second == [], "the first rank tells"
    assert two_ranks.run(warnings_of_loading, tmp_path / "column_wise", "grid_shard")[0] == []
