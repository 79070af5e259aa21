"""Raw records become the very bytes that preprocessing made of the same text."""

import json

import numpy as np
import pyarrow as pa
import pytest

from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.generate.generate_options import GenerateOptions
from papilio.data_pipeline.generate.generator import generate
from papilio.data_pipeline.id_mapper import load_id_mappers
from papilio.data_pipeline.preprocess.byte_blocks import InputBlock, load_block
from papilio.data_pipeline.preprocess.criteo import parse_criteo
from papilio.data_pipeline.preprocess.engine import preprocess
from papilio.data_pipeline.preprocess.preprocess_options import PreprocessOptions
from papilio.data_pipeline.schema import CategoricalColumn, DenseColumn, Schema
from papilio.trainer.inference.encoding.json_records import RequestError, check_records
from papilio.trainer.inference.encoding.request_encoder import RequestEncoder, merge_batches

NUM_ROWS = 3000


def encoder_of(dataset) -> RequestEncoder:
    return RequestEncoder(dataset.schema, load_id_mappers(dataset.manifest, dataset.folder))


def shard_arrays(dataset):
    """Dense values, ids and lengths of all rows as they lie in the shards, in the encoder's order."""
    split = dataset.open_split("train")
    shards = [split.shard(i) for i in range(len(split.info.shards))]
    dense = np.concatenate([shard.dense for shard in shards])
    ids, lengths = [], []
    for feature in range(len(dataset.schema.categorical)):
        for shard in shards:
            bags = shard.bags[feature]
            ids.append(bags.ids)
            lengths.append(np.ones(shard.num_rows, np.int32) if bags.offsets is None else np.diff(bags.offsets))
    return dense, np.concatenate(ids), np.concatenate(lengths)


def assert_same(encoded, dense, ids, lengths) -> None:
    assert encoded.faults == {}
    assert (encoded.dense.dtype, encoded.ids.dtype, encoded.lengths.dtype) == (np.float32, np.int32, np.int32)
    np.testing.assert_array_equal(encoded.dense.view(np.uint32), dense.view(np.uint32))
    np.testing.assert_array_equal(encoded.ids, ids)
    np.testing.assert_array_equal(encoded.lengths, lengths)


@pytest.fixture(scope="module")
def criteo(tmp_path_factory):
    """Generated Criteo text, the data set that `papilio preprocess` makes of it, and its rows as records."""
    folder = tmp_path_factory.mktemp("criteo")
    generate(GenerateOptions(shape="criteo_small", num_rows=NUM_ROWS, output=str(folder / "raw"), format="tsv"))
    (text,) = [path for path in (folder / "raw").iterdir() if path.stat().st_size > 100_000]
    preprocess(
        PreprocessOptions(
            source="criteo",
            inputs=(str(text),),
            output=str(folder / "set"),
            frequency_threshold=2,
            split="fraction",
            fractions=(1.0, 0.0, 0.0),
            num_workers=1,
            show_progress=False,
        )
    )
    dataset = open_dataset(str(folder / "set"))
    names = [*dataset.schema.dense_names, *dataset.schema.categorical_names]
    records = []
    for line in text.read_text().splitlines():
        fields = line.split("\t")[1:]
        values = [None if field == "" else int(field) if i < 13 else field for i, field in enumerate(fields)]
        records.append(dict(zip(names, values, strict=True)))
    return text, dataset, records


def test_records_become_the_bytes_of_the_shards(criteo) -> None:
    _, dataset, records = criteo
    through_json = check_records(json.loads(json.dumps({"records": records})), dataset.schema)
    encoded = encoder_of(dataset).encode_records(through_json)
    dense, ids, lengths = shard_arrays(dataset)
    assert_same(encoded, dense, ids, lengths)
    assert encoded.num_unknown_ids == np.count_nonzero(ids == 0) > 100


def test_arrow_columns_become_the_bytes_of_the_shards(criteo) -> None:
    _, dataset, records = criteo
    table = pa.Table.from_pylist(records)
    assert_same(encoder_of(dataset).encode_table(table), *shard_arrays(dataset))
    as_dictionaries = pa.table({name: table.column(name).dictionary_encode() for name in table.column_names})
    assert_same(encoder_of(dataset).encode_table(as_dictionaries), *shard_arrays(dataset))
    as_numbers = pa.table(
        {
            name: pa.array([None if v is None else int(v, 16) for v in table.column(name).to_pylist()], pa.uint32())
            if name.startswith("C")
            else table.column(name).cast(pa.float64())
            for name in table.column_names
        }
    )
    assert_same(encoder_of(dataset).encode_table(as_numbers), *shard_arrays(dataset))


def test_criteo_text_becomes_the_bytes_of_the_shards(criteo) -> None:
    text, dataset, _ = criteo
    chunk = parse_criteo(load_block(InputBlock(0, 0, 0, text.stat().st_size), str(text)), dataset.schema)
    assert_same(encoder_of(dataset).encode_chunk(chunk), *shard_arrays(dataset))


def test_one_malformed_record_leaves_the_others_as_they_are(criteo) -> None:
    _, dataset, records = criteo
    encoder = encoder_of(dataset)
    whole = encoder.encode_records(records[:20])
    broken = [*records[:7], {**records[7], "C3": "xyz"}, *records[8:20]]
    encoded = encoder.encode_records(broken)
    assert encoded.faults == {7: ("C3", "'xyz' is not an id of at most 8 hexadecimal digits")}
    others = [row for row in range(20) if row != 7]
    np.testing.assert_array_equal(encoded.dense, whole.dense)
    np.testing.assert_array_equal(encoded.ids.reshape(26, 20)[:, others], whole.ids.reshape(26, 20)[:, others])


SCHEMA = Schema(
    dense=(DenseColumn(name="price", transform="identity", missing_value=-1.0), DenseColumn(name="age")),
    categorical=(
        CategoricalColumn(name="city"),
        CategoricalColumn(name="tags", multi_hot=True, separator="|"),
        CategoricalColumn(name="user", kind="integer"),
        CategoricalColumn(name="item", kind="integer", encoding="hash", num_buckets=50),
        CategoricalColumn(name="agent", encoding="hash", num_buckets=40),
        CategoricalColumn(name="slot", kind="integer", encoding="identity", num_buckets=9),
        CategoricalColumn(
            name="slots", kind="integer", encoding="identity", num_buckets=9, multi_hot=True, separator="|"
        ),
        CategoricalColumn(name="pages", kind="hex", multi_hot=True, separator="|"),
    ),
)
ROWS = [
    ("0", "1.5", "3", "Ulm", "a|b|c", "-7", "12", "Mozilla", "8", "2|3", "ff|0"),
    ("1", "", "41", "Köln", "b", "9000000000", "-12", "", "", "", "FF"),
    ("0", "-2.25", "", "", "", "", "", "curl", "2", "5", ""),
    ("1", "1e3", "7", "Ulm", "c|a|a", "-7", "0", "Mozilla", "8", "8|8|2", "abc|ff"),
]
NAMES = ["click", "price", "age", "city", "tags", "user", "item", "agent", "slot", "slots", "pages"]


@pytest.fixture(scope="module")
def table_set(tmp_path_factory):
    """A table with every kind of column, preprocessed from CSV."""
    folder = tmp_path_factory.mktemp("table")
    lines = [",".join(NAMES), *(",".join(row) for row in ROWS * 3)]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    (folder / "schema.toml").write_text(toml_of(SCHEMA))
    preprocess(
        PreprocessOptions(
            source="table",
            inputs=(str(folder / "log.csv"),),
            schema_path=str(folder / "schema.toml"),
            output=str(folder / "set"),
            split="fraction",
            fractions=(1.0, 0.0, 0.0),
            num_workers=1,
            show_progress=False,
        )
    )
    return open_dataset(str(folder / "set"))


def toml_of(schema: Schema) -> str:
    lines = ['label = "click"']
    for kind, columns in (("dense", schema.dense), ("categorical", schema.categorical)):
        for column in columns:
            values = column.model_dump(exclude_none=True)
            lines += [f"[[{kind}]]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines)


def typed_record(row) -> dict[str, object]:
    """The row as JSON would say it: numbers as numbers, bags as lists, nothing where there is nothing."""
    record: dict[str, object] = {}
    for name, field in zip(NAMES[1:], row[1:], strict=True):
        if field == "":
            continue
        if name in ("price", "age"):
            record[name] = float(field)
        elif name in ("tags", "pages"):
            record[name] = field.split("|")
        elif name == "slots":
            record[name] = [int(part) for part in field.split("|")]
        else:
            record[name] = int(field) if name in ("user", "item", "slot") else field
    return record


def test_every_kind_of_column_is_encoded_as_in_preprocessing(table_set) -> None:
    encoder = encoder_of(table_set)
    records = [typed_record(row) for row in ROWS * 3]
    assert_same(encoder.encode_records(records), *shard_arrays(table_set))
    numbers = [{name: record[name] for name in ("price", "age") if name in record} for record in records]
    as_text = [dict(zip(NAMES[3:], row[3:], strict=True)) for row in ROWS * 3]
    joined = [text | record for text, record in zip(as_text, numbers, strict=True)]
    assert_same(encoder.encode_records(joined), *shard_arrays(table_set))


def test_arrow_lists_and_strings_are_encoded_as_in_preprocessing(table_set) -> None:
    records = [{name: typed_record(row).get(name) for name in NAMES[1:]} for row in ROWS * 3]
    assert_same(encoder_of(table_set).encode_table(pa.Table.from_pylist(records)), *shard_arrays(table_set))


def test_batches_merge_feature_after_feature(table_set) -> None:
    encoder = encoder_of(table_set)
    records = [typed_record(row) for row in ROWS * 3]
    parts = [encoder.encode_records(records[a:b]) for a, b in ((0, 5), (5, 5), (5, 6), (6, 12))]
    assert_same(merge_batches(parts), *shard_arrays(table_set))
    broken = encoder.encode_records([{"city": 1.5}])
    assert merge_batches([parts[0], broken]).faults == {5: broken.faults[0]}


def test_no_records_make_an_empty_batch(table_set, criteo) -> None:
    for dataset in (table_set, criteo[1]):
        empty = encoder_of(dataset).encode_records([])
        assert empty.dense.shape == (0, len(dataset.schema.dense))
        assert (len(empty.ids), len(empty.lengths)) == (0, 0)


def test_ids_beyond_an_identity_table_and_ids_never_seen_are_unknown(table_set) -> None:
    encoded = encoder_of(table_set).encode_records(
        [{"slot": 9, "slots": [2**40, 3], "city": "Rom", "user": 5, "tags": ["a", "z"], "pages": ["1"]}]
    )
    assert encoded.faults == {}
    per_feature = np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])
    found = dict(zip(table_set.schema.categorical_names, (ids.tolist() for ids in per_feature), strict=True))
    assert (found["slot"], found["slots"], found["city"], found["user"]) == ([0], [0, 5], [0], [0])
    assert (found["pages"], found["tags"][1], found["item"]) == ([0], 0, [1])
    assert encoded.num_unknown_ids == 6


@pytest.mark.parametrize(
    ("record", "column", "reason"),
    [
        ({"price": "12"}, "price", "'12' is a string, must be a number or null"),
        ({"age": True}, "age", "True is a boolean, must be a number or null"),
        ({"age": float("inf")}, "age", "infinite, must be a finite number"),
        ({"age": 10**400}, "age", "too large a number, must fit 64-bit floating point"),
        ({"city": 1.5}, "city", "1.5 is a fraction, must be a string, or null"),
        ({"city": ["Ulm"]}, "city", "['Ulm'] is a list, must be a string, or null"),
        ({"city": "\ud800"}, "city", "'\\ud800' is not UTF-8 text"),
        ({"user": "x1"}, "user", "'x1' is not a whole number of 64 bits"),
        ({"user": 2**63}, "user", "9223372036854775808 is not a whole number of 64 bits"),
        ({"user": False}, "user", "False is a boolean, must be a whole number, or null"),
        (
            {"city": 2.0**53},
            "city",
            "9007199254740992.0 is a float beyond 9007199254740991, where several ids become one",
        ),
        ({"user": float("inf")}, "user", "inf is infinite, must be a whole number, or null"),
        ({"price": 1e39}, "price", "1e+39 is too large for 32 bits, must be between -3.4e38 and 3.4e38"),
        ({"tags": "['a', 'b']"}, "tags", "\"['a', 'b']\" is a printed list; write its ids with '|' between them"),
        ({"tags": 3}, "tags", "3 is a number, must be a list, each a string"),
        ({"tags": ["a", {}]}, "tags", "{} is an object, must be a string, or null"),
        ({"slot": -1}, "slot", "id -1 is out of range, must be 0 or more"),
        ({"pages": ["1", "123456789"]}, "pages", "'123456789' is not an id of at most 8 hexadecimal digits"),
    ],
)
def test_malformed_values_are_named(table_set, record, column, reason) -> None:
    encoded = encoder_of(table_set).encode_records([{}, record, {}])
    assert list(encoded.faults) == [1]
    assert encoded.faults[1][0] == column
    assert encoded.faults[1][1].startswith(reason)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ([], 'the body must be {"records": [{"<column>": <value>, ...}, ...]}; GET / shows an example'),
        ({"records": {}}, "the body must be"),
        ({"records": [], "n": 1}, "'n' is not a key of a request; \"records\" is the only one"),
        ({"records": [{}, 3]}, "record 1 is a number, must be an object of values by column name"),
        ({"records": [{"citty": "Ulm"}]}, "record 0: there is no column 'citty'; did you mean city?"),
        ({"records": [{"zzzzz": 1}]}, "record 0: there is no column 'zzzzz'; columns: price, age, city"),
    ],
)
def test_requests_of_another_form_are_refused(payload, message) -> None:
    with pytest.raises(RequestError) as error:
        check_records(payload, SCHEMA)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"city": None}, "there is no column city; send nulls where values are missing"),
        ({"town": pa.array(["Ulm"])}, "there is no column 'town'"),
        ({"city": pa.array([True])}, "column city is of type bool, must hold text or integers; write its values as 0"),
        ({"city": pa.array([["Ulm"]])}, "column city is of type list<"),
        ({"tags": pa.array([3])}, "column tags is of type int64, must hold lists of text or integers"),
        ({"tags": pa.array([[True]])}, "must hold lists of text or integers"),
    ],
)
def test_arrow_tables_with_other_columns_are_refused(table_set, change, message) -> None:
    columns = {name: pa.array([None], pa.null()) for name in NAMES[1:]} | change
    columns = {name: array for name, array in columns.items() if array is not None}
    with pytest.raises(RequestError) as error:
        encoder_of(table_set).encode_table(pa.table(columns))
    assert message in str(error.value)


def test_arrow_types_and_their_values_are_judged_as_in_preprocessing(table_set) -> None:
    def encode(**changed: pa.Array):
        nulls = {name: pa.nulls(2) for name in NAMES[1:]}
        return encoder_of(table_set).encode_table(pa.table(nulls | changed))

    for data_type in (pa.timestamp("us"), pa.date32(), pa.struct([("a", pa.int64())]), pa.binary(4), pa.bool_()):
        for name in ("price", "city", "tags", "user", "slot"):
            with pytest.raises(RequestError, match=rf"column {name} is of type .*, must hold .*; ") as error:
                encode(**{name: pa.nulls(2, data_type)})
            assert "\n" not in str(error.value)
    cities = pa.array(["Ulm", None], pa.string_view())
    tags = pa.array([["c", None, ""], None], pa.large_list(pa.string_view()))
    encoded = encode(city=cities, tags=tags, user=pa.array([-7.0, float("nan")]), slots=pa.array([[2.0], [8.0]]))
    plain = encoder_of(table_set).encode_records(
        [{"city": "Ulm", "tags": "c", "user": -7, "slots": [2]}, {"slots": "8"}]
    )
    assert encoded.faults == plain.faults == {}
    np.testing.assert_array_equal(encoded.ids, plain.ids)
    np.testing.assert_array_equal(encoded.lengths, plain.lengths)
    faults = encode(price=pa.array([1e39, 1.0]), user=pa.array([1.0, 1.5])).faults
    assert faults[0][1].startswith("1e+39 is too large for 32 bits")
    assert faults[1] == ("user", "1.5 is not a whole number of 64 bits")


def test_whole_floats_and_nan_in_json_are_those_of_the_log(table_set) -> None:
    encoder = encoder_of(table_set)
    floats = {"user": -7.0, "item": 12.0, "slot": 8.0, "slots": [2.0, None, float("nan"), 3], "pages": [255.0, "0"]}
    numbers = {"user": "-7", "item": "12.0", "slot": "8", "slots": "2|nan||3", "pages": [255, "00"]}
    first, second = encoder.encode_records([floats]), encoder.encode_records([numbers])
    assert first.faults == second.faults == {}
    assert first.ids.tolist() == second.ids.tolist()
    assert first.lengths.tolist() == second.lengths.tolist() == [1, 0, 1, 1, 1, 1, 2, 2]
    missing = encoder.encode_records([{"city": float("nan"), "user": float("nan"), "slot": None}])
    assert (missing.faults, missing.ids.tolist()) == ({}, [1] * 5)
