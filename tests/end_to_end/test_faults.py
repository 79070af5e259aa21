"""Jobs that are killed end as those that nobody disturbs: the short version of `benchmarks.faults`."""

import pytest

from benchmarks.faults import TOLERANCE, run_jobs
from benchmarks.faults_data import SHORT

FIXED, CHANGING = [2], [2, 1]
NUM_KILLS = 6


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """A job on two ranks, and one whose number of ranks changes with every start, each killed some times."""
    folder = str(tmp_path_factory.mktemp("faults"))
    jobs = run_jobs(folder, SHORT, [FIXED, CHANGING], NUM_KILLS, seed=5, kills_per_job=NUM_KILLS // 2)
    return dict(zip(("fixed", "changing"), jobs, strict=False))


@pytest.mark.parametrize("kind", ["fixed", "changing"])
def test_no_sample_is_lost_or_repeated_and_no_checkpoint_damaged(verdicts, kind):
    verdict = verdicts[kind]
    assert verdict.num_kills > 0
    assert (verdict.lost, verdict.repeated, verdict.other_batches) == (0, 0, 0)
    job = verdict.job
    assert job.damaged == 0, "a checkpoint with a marker can be read whole"
    assert job.not_newest == 0, "the newest complete checkpoint is the one to go on from"
    assert job.swept == job.uncommitted, "what was never completed is removed"
    assert job.stuck == 0, "ranks that lost another end by themselves"


def test_on_the_same_number_of_ranks_everything_is_bit_equal(verdicts):
    assert verdicts["fixed"].job.world_sizes == [2] * len(verdicts["fixed"].job.attempts)
    assert verdicts["fixed"].difference.is_bit_equal, verdicts["fixed"].difference


def test_on_other_numbers_of_ranks_everything_is_close(verdicts):
    assert len(set(verdicts["changing"].job.world_sizes)) == 2
    difference = verdicts["changing"].difference
    assert difference.structure is None
    assert max(difference.tensor, difference.metric) <= TOLERANCE, difference
