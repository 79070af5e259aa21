"""Jobs that are killed end as those that nobody disturbs: the short version of `benchmarks.faults`."""

import pytest

from benchmarks.faults import TOLERANCE, run_jobs
from benchmarks.faults_data import SHORT, Size
from benchmarks.faults_evidence import Trained, lineage, lost_and_repeated

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


def attempt(mark, resumed, samples_of_steps):
    """Logs of an attempt on two ranks, of which the second has the last sample of each step."""
    steps = {step: {0: samples[:-1], 1: samples[-1:]} for step, samples in samples_of_steps.items()}
    return Trained(resumed, mark, steps, world_size=2)


def test_samples_are_counted_along_the_checkpoints_that_attempts_went_on_from():
    """Two epochs of 5 samples in steps of 3 and 2; the model of attempt b was never gone on from."""
    size = Size({}, train_samples=5, batch_size=3, epochs=2, dim=4, every_steps=1)
    begun = attempt("a", None, {0: [0, 1, 2], 1: [3, 4], 2: [4, 2, 0]})
    dead_end = attempt("b", "step_0000000001-a", {1: [4, 3], 2: [3, 3, 3]})
    ended = attempt("c", "step_0000000002-a", {2: [4, 2, 0], 3: [1, 3]})
    steps = lineage([begun, dead_end, ended], size.num_steps)
    assert steps == [[0, 1, 2], [3, 4], [0, 2, 4], [1, 3]]
    assert lost_and_repeated(steps, size) == (0, 0)
    wrong = attempt("c", "step_0000000002-a", {2: [4, 2, 2], 3: [1, 4]})
    assert lost_and_repeated(lineage([begun, dead_end, wrong], size.num_steps), size) == (2, 2)
    cut_off = attempt("c", "step_0000000002-a", {2: [4, 2, 0]})
    cut_off.steps[3] = {0: [1]}
    with pytest.raises(ValueError, match=r"step 3 was trained by ranks \[0\] of 2 only"):
        lineage([begun, cut_off], size.num_steps)
