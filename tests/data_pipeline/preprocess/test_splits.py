import numpy as np
import pytest

from papilio.data_pipeline.preprocess.preprocess_options import PreprocessOptions
from papilio.data_pipeline.preprocess.splits import make_split_rule


def rule_of(rows_per_file: list[int], **changes):
    return make_split_rule(PreprocessOptions(source="criteo", inputs=("x",), output="o", **changes), rows_per_file)


@pytest.mark.parametrize(
    ("rows_per_file", "counts"), [([70], [60, 5, 5]), ([75], [65, 5, 5]), ([10, 7], [10, 3, 4]), ([10, 1], [10, 0, 1])]
)
def test_days(rows_per_file, counts):
    splits = rule_of(rows_per_file).split_of(0, sum(rows_per_file))
    assert np.bincount(splits, minlength=3).tolist() == counts
    assert (np.diff(splits.astype(int)) >= 0).all()


def test_fraction_keeps_order():
    rule = rule_of([100, 100], split="fraction", fractions=(0.5, 0.25, 0.25))
    assert rule.split_of(98, 4).tolist() == [0, 0, 1, 1]
    assert rule.split_of(149, 2).tolist() == [1, 2]
    assert [rule.contiguous_split(0, 100), rule.contiguous_split(99, 2), rule.contiguous_split(150, 50)] == [0, None, 2]


def test_random_depends_on_seed_and_row_only():
    rule = rule_of([1000], split="random", seed=1)
    whole = rule.split_of(0, 1000)
    assert whole[300:400].tolist() == rule.split_of(300, 100).tolist()
    assert (whole != rule_of([1000], split="random", seed=2).split_of(0, 1000)).any()
    np.testing.assert_allclose(np.bincount(whole) / 1000, [0.8, 0.1, 0.1], atol=0.03)
    assert rule.contiguous_split(0, 1) is None


def test_a_share_of_one_takes_every_row():
    rule = rule_of([1000], split="random", fractions=(1.0, 0.0, 0.0))
    assert (rule.split_of(0, 1000) == 0).all()


def test_options_that_make_no_sense():
    with pytest.raises(ValueError, match="three shares that add up to 1"):
        rule_of([1], fractions=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="a table needs schema_path"):
        PreprocessOptions(source="table", inputs=("x",), output="o")
    with pytest.raises(ValueError, match="a Criteo file has a fixed schema"):
        PreprocessOptions(source="criteo", inputs=("x",), output="o", schema_path="s.toml")
