import pytest

from papilio.data_pipeline.expected import expected_dataset
from papilio.data_pipeline.generate.shapes import SHAPES
from papilio.data_pipeline.manifest import DatasetError


def test_a_shape_by_name_has_its_columns_and_two_rows_more():
    dataset = expected_dataset("criteo_terabyte_multi_hot")
    assert len(dataset.schema.dense) == 13
    assert dataset.num_embeddings["C1"] == 40_000_002
    assert dataset.num_embeddings["C6"] == 5
    stats = dataset.manifest.categorical_stats
    assert [stats[f"C{i}"].mean_ids_per_sample for i in (1, 21, 26)] == [3, 100, 1]


def test_a_file_lists_columns(tmp_path):
    path = tmp_path / "columns.toml"
    path.write_text(
        'num_dense = 2\n[[categorical]]\nname = "user"\nnum_embeddings = 1_000\n'
        '[[categorical]]\nname = "items"\nnum_embeddings = 50\nids_per_sample = 7.5\n'
    )
    dataset = expected_dataset(str(path))
    assert dataset.num_embeddings == {"user": 1_000, "items": 50}
    assert dataset.manifest.categorical_stats["items"].mean_ids_per_sample == 7.5
    assert [column.multi_hot for column in dataset.schema.categorical] == [False, True]


def test_an_unknown_shape_names_the_nearest():
    with pytest.raises(
        DatasetError, match="shape criteo_terabite: no such shape or file; did you mean criteo_terabyte"
    ):
        expected_dataset("criteo_terabite")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_dense = ", "is not TOML"),
        ("num_dense = 1", "columns.toml: categorical is missing; add it"),
        (
            'num_dense = 1\n[[categorical]]\nname = "a"\nnum_embeddings = 1',
            r"columns.toml: categorical.0.num_embeddings \(of a\) = 1: Input should be greater than 2$",
        ),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path, text, message):
    path = tmp_path / "columns.toml"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        expected_dataset(str(path))


def test_terabyte_has_criteos_26_columns():
    assert len(SHAPES["criteo_terabyte"].cardinalities) == 26
