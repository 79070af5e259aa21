"""Scores of data sets and raw files are those that the model gives row by row, whatever they are read from."""

import gzip
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from benchmarks.random_package import make_package
from papilio.data_pipeline.preprocess.engine import preprocess
from papilio.data_pipeline.preprocess.preprocess_options import PreprocessOptions
from papilio.data_pipeline.schema import criteo_schema
from papilio.trainer.config import ModelConfig
from papilio.trainer.inference import score_file
from papilio.trainer.inference.encoding.request_encoder import EncodedBatch
from papilio.trainer.inference.package.format import PackageError, describe_files, read_manifest, write_manifest
from papilio.trainer.inference.predict import main
from papilio.trainer.inference.scorer import Scorer, load_scorer, split_batch
from tests.support.served import MODEL, SCHEMA, records_of, text_rows, write_package


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> str:
    return write_package(tmp_path_factory.mktemp("package") / "shop", 0)


def run(capsys, package: str, output, **options) -> tuple[int, str]:
    settings = {"package": package, "output": str(output), "show_progress": False, "threads": 1} | options
    status = main([json.dumps(settings)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def one_by_one(package: str, records) -> list[float]:
    """The oracle: each record alone, as a request."""
    scorer = load_scorer(package)
    return [float(scorer.score(scorer.encoder.encode_records([record]))[0]) for record in records]


@pytest.mark.parametrize("label", [True, False])
def test_text_tables(package, tmp_path, capsys, label) -> None:
    records = records_of(0, 60)
    (tmp_path / "a.csv").write_text("\n".join(text_rows(records[:41], label=label)) + "\n")
    with gzip.open(tmp_path / "b.csv.gz", "wt") as file:
        file.write("\n".join(text_rows(records[41:], label=label)))
    inputs = [str(tmp_path / "a.csv"), str(tmp_path / "b.csv.gz")]
    status, text = run(capsys, package, tmp_path / "s.parquet", inputs=inputs, source="table")
    assert status == 0, text
    scores = pq.read_table(tmp_path / "s.parquet")
    assert scores.column_names == ["file", "line", "label", "probability"]
    np.testing.assert_allclose(scores["probability"].to_numpy(), one_by_one(package, records), rtol=0, atol=1e-6)
    assert scores["file"].to_pylist() == [inputs[0]] * 41 + [inputs[1]] * 19
    assert scores["line"].to_pylist() == [*range(2, 43), *range(2, 21)]
    labels = [i % 2 for i in range(41)] + [i % 2 for i in range(19)]
    assert scores["label"].to_pylist() == (labels if label else [None] * 60)
    assert "60 rows in" in text


def test_parquet_without_labels_and_with_columns_that_the_model_does_not_know(package, tmp_path, capsys) -> None:
    records = records_of(0, 50)
    table = pa.Table.from_pylist([record | {"other": 1} for record in records])
    pq.write_table(table, tmp_path / "in.parquet")
    status, text = run(capsys, package, tmp_path / "s.parquet", inputs=[str(tmp_path / "in.parquet")], source="table")
    assert status == 0, text
    scores = pq.read_table(tmp_path / "s.parquet")
    np.testing.assert_allclose(scores["probability"].to_numpy(), one_by_one(package, records), rtol=0, atol=1e-6)
    assert scores["line"].to_pylist() == list(range(1, 51))


def test_malformed_rows_keep_their_place_and_have_no_score(package, tmp_path, capsys) -> None:
    records = records_of(0, 10)
    rows = text_rows(records, label=True)
    rows[4] = "x" + rows[4][1:]
    rows[8] = "1,2"
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    options = {"inputs": [str(tmp_path / "a.csv")], "source": "table"}
    status, text = run(capsys, package, tmp_path / "s.parquet", **options, max_bad_rows=2)
    assert status == 0, text
    assert "2 malformed rows have no score" in text
    scores = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert [row["line"] for row in scores] == list(range(2, 12))
    assert [i for i, row in enumerate(scores) if row["probability"] is None] == [3, 7]
    expected = one_by_one(package, records)
    for i in (0, 4, 9):
        assert scores[i]["probability"] == pytest.approx(expected[i], abs=1e-6)
    status, text = run(capsys, package, tmp_path / "t.parquet", **options)
    assert status == 1
    assert f"{tmp_path / 'a.csv'}, line 5, field click: 'x' is not a number" in text
    assert "raise --max-bad-rows (now 0)" in text
    assert [path.name for path in tmp_path.glob("t.parquet*")] == []


def test_numbers_that_are_too_large_give_no_score(package, tmp_path, capsys, monkeypatch) -> None:
    """Neither those beyond 32 bits, nor those with which the model's own sums overflow, as here from 1e38 on."""
    plain = Scorer.score
    overflowing = lambda scorer, batch: np.where(batch.dense[:, 1] > 1e38, np.nan, plain(scorer, batch))  # noqa: E731
    monkeypatch.setattr(Scorer, "score", overflowing)
    rows = text_rows([records_of(0, 1)[0] | {"age": age} for age in (1, "1e39", 3e38, 2)], label=True)
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    options = {"inputs": [str(tmp_path / "a.csv")], "source": "table", "max_bad_rows": 2}
    status, text = run(capsys, package, tmp_path / "s.parquet", **options)
    assert status == 0, text
    assert "line 3, field age: 1e+39 is too large for 32 bits, must be between -3.4e38 and 3.4e38" in text
    assert "line 4, field (row): its score is not a finite number; its dense values are too large" in text
    scores = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert [row["line"] for row in scores if row["probability"] is None] == [3, 4]
    assert [row["line"] for row in scores] == [2, 3, 4, 5]


def criteo_line(i: int) -> list[str]:
    dense = [str(i * k % 50) if (i + k) % 4 else "" for k in range(13)]
    return dense + [f"{(i * 31 + k) % 40:08x}" if (i + k) % 7 else "" for k in range(26)]


@pytest.fixture(scope="module")
def criteo_package(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("criteo_package") / "p"
    schema = criteo_schema(num_buckets=30)
    model = ModelConfig(embedding_dim=4, dense_arch_layer_sizes=(8,), over_arch_layer_sizes=(8,))
    make_package(str(folder), schema, model, [{"I1": 3, "C1": "ff"}])
    return str(folder)


@pytest.mark.parametrize("label", [True, False])
def test_criteo_text(criteo_package, tmp_path, capsys, label) -> None:
    lines = [criteo_line(i) for i in range(30)]
    text = "\n".join("\t".join([str(i % 2)] * label + line) for i, line in enumerate(lines))
    (tmp_path / "day_0").write_text(text.replace("\n", "\n\r\n", 1) + "\n\n")  # blank lines are no rows
    output = tmp_path / "s.parquet"
    status, said = run(capsys, criteo_package, output, inputs=[str(tmp_path / "day_0")], source="criteo")
    assert status == 0, said
    names = [f"I{i}" for i in range(1, 14)] + [f"C{i}" for i in range(1, 27)]
    records = [{n: (int(v) if n[0] == "I" else v) for n, v in zip(names, line, strict=True) if v} for line in lines]
    scores = pq.read_table(output)
    expected = one_by_one(criteo_package, records)
    np.testing.assert_allclose(scores["probability"].to_numpy(), expected, rtol=0, atol=1e-6)
    assert scores["label"].to_pylist() == ([i % 2 for i in range(30)] if label else [None] * 30)
    assert scores["line"].to_pylist() == [1, *range(3, 32)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set and a package of its columns and vocabularies; the raw rows of its test split."""
    folder = tmp_path_factory.mktemp("prepared")
    records = records_of(0, 9000)
    (folder / "log.csv").write_text("\n".join(text_rows(records, label=True)) + "\n")
    toml = ['label = "click"']
    for kind, columns in (("dense", SCHEMA.dense), ("categorical", SCHEMA.categorical)):
        for column in columns:
            values = column.model_dump(exclude_none=True)
            toml += [f"[[{kind}]]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    (folder / "schema.toml").write_text("\n".join(toml))
    options = {"source": "table", "inputs": (str(folder / "log.csv"),), "schema_path": str(folder / "schema.toml")}
    manifest = preprocess(
        PreprocessOptions(
            **options,
            output=str(folder / "set"),
            split="fraction",
            fractions=(0.4, 0.0, 0.6),
            num_workers=1,
            show_progress=False,
            rows_per_shard=4096,
        )
    )
    vocabularies = {
        name: keys_of(folder / "set" / manifest.categorical_stats[name].vocabulary_file) for name in ("city", "tags")
    }
    package = folder / "package"
    make_package(str(package), manifest.data_schema, MODEL, records[:2], vocabularies=vocabularies)
    num_test = manifest.splits["test"].num_rows
    return str(folder / "set"), str(package), records[-num_test:]


def keys_of(path) -> list[str]:
    return pa.ipc.open_file(str(path)).read_all().column("value").to_pylist()


def test_a_data_set_gives_the_scores_of_its_raw_rows(prepared, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(score_file, "GROUP_ROWS", 1000)
    dataset, package, records = prepared
    status, text = run(capsys, package, tmp_path / "s.parquet", data=dataset)
    assert status == 0, text
    scores = pq.read_table(tmp_path / "s.parquet")
    assert scores["row"].to_pylist() == list(range(len(records)))
    assert pq.ParquetFile(tmp_path / "s.parquet").num_row_groups > 1
    chosen = [0, 1, 7, 4095, 4096, 4097, len(records) - 1]
    expected = one_by_one(package, [records[i] for i in chosen])
    np.testing.assert_allclose(scores["probability"].to_numpy()[chosen], expected, rtol=0, atol=1e-6)
    assert scores["label"].to_pylist()[:4] == [(9000 - len(records) + i) % 2 for i in range(4)]


def test_a_data_set_of_other_vocabularies_is_refused(prepared, package, tmp_path, capsys) -> None:
    status, text = run(capsys, package, tmp_path / "s.parquet", data=prepared[0])
    assert status == 1
    assert "in: vocabularies; its ids would look up wrong rows" in text
    assert "or score its raw files with --input" in text
    assert list(tmp_path.iterdir()) == []


def test_batches_split_into_parts_that_score_alike(package) -> None:
    scorer = load_scorer(package)
    batch = scorer.encoder.encode_records(records_of(0, 50))
    parts = list(split_batch(batch, 7))
    assert [part.num_rows for part in parts] == [7] * 7 + [1]
    whole = scorer.score(batch)
    np.testing.assert_allclose(np.concatenate([scorer.score(part) for part in parts]), whole, rtol=0, atol=1e-6)
    assert scorer.score(EncodedBatch(batch.dense[:0], batch.ids[:0], batch.lengths[:0])).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": ["a.csv"], "source": "table"}, "input a.csv does not exist or is not a file"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_read_is_named(package, tmp_path, capsys, options, message) -> None:
    status, text = run(capsys, package, tmp_path / "s.parquet", **options)
    assert (status, message in text) == (1, True), text


def test_a_table_without_a_column_is_refused(package, tmp_path, capsys) -> None:
    (tmp_path / "a.csv").write_text("price,age,city\n1,2,Ulm\n")
    options = {"inputs": [str(tmp_path / "a.csv")], "source": "table"}
    status, text = run(capsys, package, tmp_path / "s.parquet", **options)
    assert status == 1
    assert "has no column tags, item, slot; it has price, age, city" in text


@pytest.mark.parametrize(
    "name", ["tables.bin", "dense.safetensors", "schema.json", "config.json", "vocabulary/city.arrow"]
)
def test_no_score_comes_from_a_package_with_a_flipped_bit(package, tmp_path, capsys, name) -> None:
    (tmp_path / "a.csv").write_text("\n".join(text_rows(records_of(0, 9), label=True)) + "\n")
    copy = tmp_path / "package"
    shutil.copytree(package, copy)
    raw = bytearray((copy / name).read_bytes())
    raw[len(raw) // 2] ^= 4
    (copy / name).write_bytes(raw)
    options = {"inputs": [str(tmp_path / "a.csv")], "source": "table"}
    status, text = run(capsys, str(copy), tmp_path / "s.parquet", **options)
    assert status == 1 and text.count("\n") == 1
    assert text.startswith(
        f"papilio predict: error: {copy}/{name} is damaged: its checksum is not what package.json says"
    )
    assert list(tmp_path.glob("s.parquet*")) == []
    with pytest.raises(PackageError, match=rf"{name} is damaged: "):
        load_scorer(str(copy))


def test_answers_that_are_not_the_expected_ones_are_not_written(package, tmp_path, capsys) -> None:
    (tmp_path / "a.csv").write_text("\n".join(text_rows(records_of(0, 9), label=True)) + "\n")
    copy = tmp_path / "package"
    shutil.copytree(package, copy)
    sample = json.loads((copy / "sample.json").read_text())
    sample["probabilities"][0] += 0.01
    (copy / "sample.json").write_text(json.dumps(sample))
    manifest = read_manifest(str(copy))
    files = manifest.files | describe_files(str(copy), ["sample.json"])
    write_manifest(manifest.model_copy(update={"files": files}), str(copy))
    options = {"inputs": [str(tmp_path / "a.csv")], "source": "table"}
    status, text = run(capsys, str(copy), tmp_path / "s.parquet", **options)
    assert status == 1
    assert "answers its sample.json with probabilities up to 0.01 from the expected ones, more than 1e-05" in text


def test_fastest_is_refused_where_it_was_not_built(package, tmp_path, capsys) -> None:
    (tmp_path / "a.csv").write_text("\n".join(text_rows(records_of(0, 9), label=True)) + "\n")
    options = {"inputs": [str(tmp_path / "a.csv")], "source": "table", "fastest": True}
    status, text = run(capsys, package, tmp_path / "s.parquet", **options)
    assert status == 1
    assert f"{package} has no format fastest; `papilio package build {package} --format fastest` makes it" in text
    with pytest.raises(ValueError, match="--trust-formats goes with --fastest: without it no code of a package is run"):
        run(capsys, package, tmp_path / "s.parquet", **options | {"fastest": False, "trust_formats": True})
