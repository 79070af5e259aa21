"""Data sets that would teach a model nothing: each is named at preprocessing, with the key to change."""

import csv
import random
import re
import textwrap
from pathlib import Path

import pytest

from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.generate.generate_options import GenerateOptions
from papilio.data_pipeline.generate.generator import generate
from papilio.data_pipeline.manifest import DatasetError, read_manifest
from papilio.data_pipeline.preprocess.data_warnings import shown_name
from papilio.data_pipeline.preprocess.engine import preprocess
from papilio.data_pipeline.preprocess.preprocess_options import PreprocessOptions
from papilio.launch.jobs.data import summarize
from tests.support.criteo_text import criteo_options

NUM_ROWS = 600


def clean_columns() -> dict[str, list]:
    generator = random.Random(0)
    return {
        "label": [generator.randint(0, 1) for _ in range(NUM_ROWS)],
        "age": [generator.randint(0, 90) for _ in range(NUM_ROWS)],
        "user": [f"u{generator.randint(0, 50)}" for _ in range(NUM_ROWS)],
    }


def warnings_of(folder: Path, columns: dict[str, list], schema: str = "", **options) -> tuple[str, ...]:
    """Preprocess a table whose dense column is age and whose categorical one is user unless the schema says else."""
    folder.mkdir(exist_ok=True)
    with (folder / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    (folder / "schema.toml").write_text(schema or 'dense = [{name = "age"}]\ncategorical = [{name = "user"}]')
    words = {"split": "fraction", "num_workers": 1, "show_progress": False} | options
    inputs, schema_path = (str(folder / "data.csv"),), str(folder / "schema.toml")
    preprocess(
        PreprocessOptions(source="table", inputs=inputs, output=f"{folder}/out", schema_path=schema_path, **words)
    )
    return read_manifest(f"{folder}/out").warnings


def test_a_clean_table_and_generated_logs_give_no_warning(tmp_path: Path) -> None:
    assert warnings_of(tmp_path, clean_columns()) == ()
    words = {"num_rows": 1_500, "format": "tsv", "show_progress": False}
    generate(GenerateOptions(output=str(tmp_path / "raw"), shape="criteo_small", **words))
    assert preprocess(criteo_options(tmp_path / "raw" / "train.txt", tmp_path / "logs", split="random")).warnings == ()


@pytest.mark.parametrize(
    ("ages", "transform", "wanted"),
    [
        (
            [-1.5] * 180 + [2] * 420,
            "log1p",
            r'30% of its values are negative, which log1p makes 0; set transform = "id',
        ),
        (list(range(-600, 0)), "log1p", "all of its values are negative, which log1p makes 0"),
        ([-1.5] * 180 + [2] * 420, "identity", None),
        # Criteo's own counts: a tenth of -1.
        ([-1] * 60 + list(range(540)), "log1p", None),
        ([0.5] * 600, "identity", r"0\.5 \(after identity\) in all of the rows; correct it, unless"),
        ([0] * 594 + list(range(1, 7)), "log1p", r"0 \(after log1p\) in 99% of the rows"),
        ([0] * 590 + list(range(1, 11)), "log1p", None),
        ([""] * 600, "log1p", "all of its values are missing; correct the table, or leave it out"),
        (list(range(1_000_000, 1_000_600)), "identity", r'values of 1e\+06 to .* set transform = "log1p"'),
        (list(range(1_000_000, 1_000_600)), "log1p", None),
    ],
)
def test_dense_columns(tmp_path: Path, ages: list, transform: str, wanted: str | None) -> None:
    random.Random(1).shuffle(ages)
    schema = f'dense = [{{name = "age", transform = "{transform}"}}]\ncategorical = [{{name = "user"}}]'
    found = warnings_of(tmp_path, clean_columns() | {"age": ages}, schema)
    if wanted is None:
        assert found == ()
    else:
        assert len(found) == 1
        assert re.match(f"dense column age: {wanted}", found[0]), found[0]


@pytest.mark.parametrize("encoding", ['encoding = "vocabulary"', 'encoding = "hash", num_buckets = 90'])
@pytest.mark.parametrize(
    ("users", "wanted"),
    [
        (["NA"] * 3 + ["u1", "u2", "u3"] * 199, "3 of 600 ids are words for a missing value, such as NA, but count"),
        ([r"\N"] * 30 + ["u1", "u2"] * 285, r"30 of 600 ids are words for a missing value, such as \N, but count"),
        (["3.5", "4.25", "5.5e-3", "x"] * 150, "450 of 600 ids are decimal numbers, such as 3.5; write whole numbers"),
        (["10.1", "x", "y"] * 200, None),
        (["a", " a", "b"] * 200, "200 of 600 ids begin or end with a blank, such as ' a', and differ from"),
        (["one"] * 600, "the same id in all rows; leave it out"),
        ([""] * 600, "all of its values are missing; correct the table"),
    ],
)
def test_ids(tmp_path: Path, encoding: str, users: list[str], wanted: str | None) -> None:
    schema = f'dense = [{{name = "age"}}]\ncategorical = [{{name = "user", {encoding}}}]'
    found = warnings_of(tmp_path, clean_columns() | {"user": users}, schema)
    if wanted is None:
        assert found == ()
    else:
        assert [text for text in found if text.startswith(f"categorical column user: {wanted}")] == list(found)


def test_ids_that_nothing_can_be_learnt_of(tmp_path: Path) -> None:
    rows = [f"r{row}" for row in range(NUM_ROWS)]
    (found,) = warnings_of(tmp_path / "rows", clean_columns() | {"user": rows})
    assert found.startswith("categorical column user: 600 different ids in 600 values, like a row number")
    (found,) = warnings_of(tmp_path / "rare", clean_columns() | {"user": rows}, frequency_threshold=2)
    assert found == (
        "categorical column user: all of its ids occur fewer than 2 time(s) in the training split, and share one row; "
        "lower frequency_threshold, or leave it out"
    )


def test_bags(tmp_path: Path) -> None:
    schema = 'dense = [{name = "age"}]\ncategorical = [{name = "user", multi_hot = true, separator = "|"}]'
    columns = clean_columns() | {"user": ["[a|b", "c|d|e", "f|g]"] * 200}
    (found,) = warnings_of(tmp_path / "lists", columns, schema)
    assert found.startswith("categorical column user: 400 of 1,400 ids look like parts of a printed list, such as [a; ")
    (found,) = warnings_of(tmp_path / "empty", clean_columns() | {"user": [""] * NUM_ROWS}, schema)
    assert found == "categorical column user: all of its bags are empty; correct the table, or leave it out"


def test_labels_and_splits(tmp_path: Path) -> None:
    columns = clean_columns()
    found = warnings_of(tmp_path / "one_class", columns | {"label": [1] * 540 + [0, 1] * 30})
    assert [text[:60] for text in found] == [
        "split train: all 480 labels are 1, so AUC is not defined and",
        "split validation: all 60 labels are 1, so AUC is not defined",
    ]
    found = warnings_of(tmp_path / "sorted", columns | {"label": [0, 0, 0, 0, 0, 0, 0, 1] * 60 + [1, 1, 0] * 40})
    assert [text[:67] for text in found] == [
        "split validation: its label rate is 0.667, that of train 0.125; if ",
        "split test: its label rate is 0.667, that of train 0.125; if the ro",
    ]
    found = warnings_of(tmp_path / "no_rows", columns, fractions=(1, 0, 0))
    rule = "(fraction: train/validation/test 1/0/0 in row order)"
    hint = "choose --split fraction or random, and --fractions with a share above 0 for it"
    assert found == tuple(f"split {name} has no rows {rule}: {hint}" for name in ("validation", "test"))
    first = {name: values[:3] for name, values in columns.items()}
    found = warnings_of(tmp_path / "tiny", first | {"label": [0, 1, 0]}, split="days")
    assert [text.partition(" (")[0] for text in found] == [
        "split validation has no rows",
        "split test has no rows",
        "small splits, whose figures say little",
    ]


def test_a_table_without_dense_columns(tmp_path: Path) -> None:
    (found,) = warnings_of(tmp_path, clean_columns(), 'categorical = [{name = "user"}]')
    assert found.startswith("no dense column: `papilio train` needs at least one; add [[dense]] with the name of")
    with pytest.raises(
        DatasetError, match=r"out has no dense column; .*: add \[\[dense\]\] with .* and preprocess again"
    ):
        open_dataset(f"{tmp_path}/out").require_dense_columns()


def test_warnings_are_shown_in_eighty_columns(tmp_path: Path) -> None:
    names = [f"x{i}" for i in range(14)]
    schema = f"dense = [{', '.join(f'{{name = {name!r}}}' for name in names)}]\ncategorical = [{{name = 'user'}}]"
    warnings_of(tmp_path, clean_columns() | {name: [-1] * NUM_ROWS for name in names}, schema)
    manifest = read_manifest(str(tmp_path / "out"))
    lines = summarize("out", manifest).splitlines()[4:]
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("warning: dense column x") for line in lines) == 12
    assert lines[-1] == "warning: and 2 more, in out/manifest.json"
    text = " ".join(line.strip() for line in lines[:3])
    assert text.startswith(f"warning: {textwrap.shorten(manifest.warnings[0], 100, placeholder='')}")


def test_names_are_quoted_and_cut_where_they_would_mislead() -> None:
    assert [shown_name("age"), shown_name("a b"), shown_name("a\n"), shown_name("")] == ["age", "a b", r"'a\n'", "''"]
    assert shown_name("x" * 50) == "x" * 39 + "…"
