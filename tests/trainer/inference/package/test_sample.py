"""The sample request of a package: raw values of every kind of column that become the data set's own ids."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.preprocess.engine import preprocess
from papilio.data_pipeline.preprocess.preprocess_options import PreprocessOptions
from papilio.data_pipeline.preprocess.vocabulary import vocabulary_file
from papilio.trainer.inference.encoding.request_encoder import load_request_encoder
from papilio.trainer.inference.export.export_options import ExportOptions
from papilio.trainer.inference.export.exporter import export_package
from papilio.trainer.inference.package.format import PackageError
from papilio.trainer.inference.package.sample_check import load_checked_scorer
from tests.support.trained_runs import write_run

SCHEMA = """
label = "click"
[[dense]]
name = "count"
[[dense]]
name = "price"
transform = "identity"
missing_value = -1.0
[[categorical]]
name = "city"
frequency_threshold = 2
[[categorical]]
name = "agent"
kind = "hex"
[[categorical]]
name = "user"
kind = "integer"
[[categorical]]
name = "tags"
multi_hot = true
separator = "|"
frequency_threshold = 2
[[categorical]]
name = "item"
encoding = "hash"
num_buckets = 50
[[categorical]]
name = "pages"
kind = "integer"
encoding = "hash"
num_buckets = 40
multi_hot = true
separator = "|"
[[categorical]]
name = "slot"
kind = "integer"
encoding = "identity"
num_buckets = 9
"""
HEADER = "click,count,price,city,agent,user,tags,item,pages,slot"
# The second row: all rare or missing. The first four are the sample.
ROWS = [
    "1,3,2.5,Ulm,0a1b2c3d,-7,x|y,abc,5|6|5,3",
    "0,,,Rare,,,once,,,0",
    "0,-2,0.1,Köln,ff,9000000000,,\u00fc,1,8",
    "1,1000000,1e-3,Köln,0a1b2c3d,-7,y|x|x,abc,,1",
    "0,7,4,Ulm,ff,9000000000,y,z,2,2",
    "1,7,4,Ulm,ff,-7,x,z,2,2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    (folder / "log.csv").write_text("\n".join([HEADER, *ROWS]) + "\n")
    (folder / "schema.toml").write_text(SCHEMA)
    options = PreprocessOptions(
        source="table",
        inputs=(str(folder / "log.csv"),),
        schema_path=str(folder / "schema.toml"),
        output=str(folder / "set"),
        split="fraction",
        fractions=(1.0, 0.0, 0.0),
        num_workers=1,
        show_progress=False,
    )
    preprocess(options)
    return str(folder / "set")


@pytest.fixture(scope="module")
def package(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    run, _ = write_run(folder / "run", data)
    return export_package(run, str(folder / "package"), ExportOptions(has_gate=False))


def read_sample(package):
    return json.loads(Path(package.path("sample.json")).read_text())


def ids_by_column(dataset, num_rows):
    columns = dataset.open_split("train").shard(0)
    found = {}
    for name, bags in zip(dataset.schema.categorical_names, columns.bags, strict=True):
        bounds = np.arange(num_rows + 1) if bags.offsets is None else bags.offsets[: num_rows + 1]
        found[name] = [bags.ids[first:last].tolist() for first, last in itertools.pairwise(bounds)]
    return found


def ids_of_sample(sample, names):
    lengths = np.array(sample["encoded"]["lengths"]).reshape(len(names), -1)
    ends = np.cumsum(lengths).reshape(lengths.shape)
    ids = sample["encoded"]["ids"]
    return {
        name: [ids[end - length : end] for end, length in zip(ends[f].tolist(), lengths[f].tolist(), strict=True)]
        for f, name in enumerate(names)
    }


def test_ids_are_those_of_the_data_set_where_a_raw_value_is_known(package, data):
    dataset = open_dataset(data)
    sample, expected = read_sample(package), ids_by_column(dataset, 4)
    found = ids_of_sample(sample, dataset.schema.categorical_names)
    for name in ("agent", "user", "slot"):
        assert found[name] == expected[name], name
    # "Rare" and "once" have no id of their own: the most frequent value stands for them.
    assert expected["city"][1] == expected["tags"][1] == [0]
    assert found["city"] == [expected["city"][0], [2], *expected["city"][2:]]
    assert found["tags"] == [expected["tags"][0], [2], *expected["tags"][2:]]
    # Hashing loses the raw values: others are made up, as many of them.
    for name in ("item", "pages"):
        assert list(map(len, found[name])) == list(map(len, expected[name]))


def test_raw_values_are_those_of_the_log(package):
    records = read_sample(package)["request"]["records"]
    assert [record["city"] for record in records] == ["Ulm", "Ulm", "Köln", "Köln"]
    assert [record["agent"] for record in records] == ["0a1b2c3d", None, "000000ff", "0a1b2c3d"]
    assert [record["user"] for record in records] == [-7, None, 9_000_000_000, -7]
    assert [record["tags"] for record in records][::3] == [["x", "y"], ["y", "x", "x"]]
    assert [record["slot"] for record in records] == [3, 0, 8, 1]
    assert [record["count"] for record in records] == [3, 0, 0, 1_000_000]
    assert [record["price"] for record in records] == [2.5, -1, 0.1, 0.001]
    assert [len(record["pages"]) for record in records] == [3, 0, 1, 0]


def test_the_encoder_makes_the_same_of_it(package):
    sample = read_sample(package)
    batch = load_request_encoder(package).encode_records(sample["request"]["records"])
    assert batch.faults == {}
    np.testing.assert_array_equal(batch.dense, np.array(sample["encoded"]["dense"], np.float32))
    assert batch.ids.tolist() == sample["encoded"]["ids"]
    assert batch.lengths.tolist() == sample["encoded"]["lengths"]


def test_whoever_loads_the_package_finds_its_answers(package):
    load_checked_scorer(package.folder)


def test_vocabularies_come_along(package, data):
    names = {name for name in package.manifest.files if name.startswith("vocabulary/")}
    assert names == {"vocabulary/city.arrow", "vocabulary/agent.npy", "vocabulary/user.npy", "vocabulary/tags.arrow"}
    for name in names:
        assert Path(package.path(name)).read_bytes() == Path(data, name).read_bytes()


@pytest.mark.parametrize(("change", "message"), [("cut", "was changed after it was written"), ("gone", "is missing")])
def test_vocabularies_that_are_not_those_of_the_data_set_are_refused(tmp_path, data, change, message):
    shutil.copytree(data, tmp_path / "set")
    run, _ = write_run(tmp_path / "run", tmp_path / "set")
    path = tmp_path / "set" / vocabulary_file("city", "string")
    if change == "gone":
        path.unlink()
    else:
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    with pytest.raises(PackageError, match=rf"vocabulary .*city\.arrow {message}.*; restore"):
        export_package(run, str(tmp_path / "package"), ExportOptions(has_gate=False))
    assert not (tmp_path / "package").exists()
