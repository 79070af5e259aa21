import numpy as np
import pytest

from papilio.data_pipeline.generate.shapes import SHAPES
from papilio.data_pipeline.generate.synthetic import Chunk, draw_chunk, make_teacher
from papilio.data_pipeline.generate.teacher import Inputs, Teacher, _pooled
from papilio.data_pipeline.shards import Bags

SHAPE = SHAPES["criteo_small"]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return make_teacher(SHAPE)


@pytest.fixture(scope="module")
def chunk(teacher: Teacher) -> Chunk:
    return draw_chunk(SHAPE, teacher, seed=1, chunk=0)


def test_labels_follow_the_probabilities(chunk: Chunk) -> None:
    bins = np.digitize(chunk.probabilities, np.linspace(0, 1, 11))
    for number in np.unique(bins):
        inside = bins == number
        expected = chunk.probabilities[inside].mean()
        deviation = np.sqrt(expected * (1 - expected) / inside.sum())
        assert abs(chunk.labels[inside].mean() - expected) < 5 * deviation
    assert chunk.labels.mean() == pytest.approx(0.25, abs=0.01)


def test_a_sample_keeps_its_probability_in_any_company(teacher: Teacher, chunk: Chunk) -> None:
    few = slice(100, 110)
    bags = tuple(Bags(found.ids[few]) for found in chunk.raw.bags)
    alone = teacher.probabilities(Inputs(chunk.dense[few], bags))
    assert np.array_equal(alone, chunk.probabilities[few])


def test_teacher_of_a_shape_is_always_the_same(chunk: Chunk) -> None:
    again = draw_chunk(SHAPE, make_teacher(SHAPE), seed=1, chunk=0)
    assert np.array_equal(again.probabilities, chunk.probabilities)


def test_rare_ids_matter_little(teacher: Teacher, chunk: Chunk) -> None:
    def spread(rank: int) -> float:
        logits = []
        for feature in range(26):
            if SHAPE.cardinalities[feature] < 60_000:
                continue
            few = [Bags(found.ids[:500].copy()) for found in chunk.raw.bags]
            few[feature].ids[:] = rank + 2
            p = teacher.probabilities(Inputs(chunk.dense[:500], tuple(few))).astype(np.float64)
            few[feature].ids[:] = 0
            base = teacher.probabilities(Inputs(chunk.dense[:500], tuple(few))).astype(np.float64)
            logits.append(np.abs(np.log(p / (1 - p)) - np.log(base / (1 - base))).mean())
        return float(np.mean(logits))

    assert spread(50_000) < spread(0) / 10


def test_bags_are_summed_and_empty_ones_are_zero() -> None:
    table = np.arange(8, dtype=np.float32).reshape(4, 2)
    bags = Bags(np.array([1, 3, 3], np.int32), np.array([0, 0, 2, 3, 3], np.int32))
    assert _pooled(table, bags).tolist() == [[0, 0], [8, 10], [6, 7], [0, 0]]
