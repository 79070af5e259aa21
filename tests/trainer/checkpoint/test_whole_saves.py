"""A checkpoint holds every planned table whole, or is refused when it is to be committed."""

import pytest

from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.checkpoint.format import coverage_problem
from tests.support.checkpoints import newest
from tests.support.datasets import write_dataset
from tests.support.small_runs import EVERY_3, make_config, run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """403 samples to train on: 20 steps of 20 and one of 3 an epoch."""
    return write_dataset(tmp_path_factory.mktemp("data"))


def run_with_shards_lost(ranks, config, losing_ranks):
    """Train; from the save of step 6 on these ranks find none of their shards, as after a rename in TorchRec."""
    from papilio.trainer.checkpoint import model_state, saver

    find, save = model_state.local_table_shards, saver.Saver.save

    def save_less(self, marker, **keywords):
        if marker.step >= 6 and ranks.rank in losing_ranks:
            model_state.local_table_shards = lambda model: []
        return save(self, marker, **keywords)

    saver.Saver.save = save_less
    try:
        return run(ranks, config)
    finally:
        model_state.local_table_shards, saver.Saver.save = find, save


@pytest.mark.parametrize("is_asynchronous", [True, False])
def test_a_checkpoint_without_the_planned_tables_is_refused(two_ranks, data, tmp_path, is_asynchronous):
    checkpoint = {**EVERY_3, "asynchronous": is_asynchronous}
    config = make_config(data, tmp_path / "run", checkpoint=checkpoint)
    for message in two_ranks.run(run_with_shards_lost, config, [0, 1]):
        assert message.startswith("LostTableError: the model as it was sharded lacks t_")
        assert "which the plan has: no checkpoint of it would be whole, so none is written. Plan anew" in message
    folder = CheckpointFolder(str(tmp_path / "run" / "checkpoints"))
    assert [entry.marker.step for entry in folder.committed()] == [3], "the one before stays the newest"
    assert folder.names() == [newest(folder.path).name], "nothing is left of the one that was refused"


def test_a_checkpoint_with_half_of_a_table_is_refused(two_ranks, data, tmp_path):
    config = make_config(data, tmp_path / "run", sharding={"types": ["row_wise"]})
    messages = two_ranks.run(run_with_shards_lost, config, [1])
    for message in messages:
        assert message.startswith("LostTableError: the model as it was sharded lacks tables.t_")
        assert ".weight (" in message
        assert " values)" in message
    folder = CheckpointFolder(str(tmp_path / "run" / "checkpoints"))
    assert [entry.marker.step for entry in folder.committed()] == [3], "the one before stays the newest"
    assert "resuming from step 3, saved " in two_ranks.run(run, config)[0]


@pytest.mark.parametrize(
    ("shape", "rectangles", "problem"),
    [
        ((4, 2), [((0, 0), (2, 2)), ((2, 0), (2, 2))], None),
        ((4, 2), [((0, 1), (4, 1)), ((0, 0), (1, 1)), ((1, 0), (3, 1))], None),
        ((4,), [((0,), (4,))], None),
        ((), [((), ())], None),
        ((3, 2, 2), [((0, 0, 0), (3, 2, 2))], None),
        ((4, 2), [((0, 0), (3, 2))], "6 of 8 values"),
        ((4, 2), [], "0 of 8 values"),
        ((4, 2), [((0, 0), (2, 2)), ((0, 0), (2, 2))], "rows 0 to 1 are there twice of columns 0 to 1"),
        ((6, 2), [((0, 0), (2, 2)), ((2, 0), (2, 2)), ((3, 0), (2, 2))], "rows 3 to 3 are there twice"),
        ((4, 2), [((0, 0), (2, 2)), ((3, 0), (2, 2))], "rows 2 to 2 are missing of columns 0 to 1"),
        ((4, 3), [((0, 0), (4, 2)), ((0, 1), (4, 1))], "columns 1 to 1 are there twice"),
    ],
)
def test_what_shards_leave_out_is_told(shape, rectangles, problem):
    found = coverage_problem(shape, rectangles)
    assert found == problem or (problem is not None and found is not None and found.startswith(problem))


def test_a_table_of_another_size_is_refused():
    from papilio.trainer.checkpoint.format import Block, Index, LostTableError, SavedTensor
    from papilio.trainer.checkpoint.saver import check_whole

    whole = SavedTensor("float32", (4, 2), (Block((0, 0), (4, 2), "f", 0, 32, 0),))
    with pytest.raises(LostTableError, match=r"lacks tables\.a\.weight \(it has 4 x 2 values, 1,000 x 2 are planned\)"):
        check_whole(Index({"tables.a.weight": whole}), {"a": (1_000, 2)})
