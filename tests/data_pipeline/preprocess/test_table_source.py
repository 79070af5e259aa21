import gzip
import itertools
import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from papilio.data_pipeline.id_mapper import load_id_mappers
from papilio.data_pipeline.manifest import read_manifest
from papilio.data_pipeline.preprocess import byte_blocks, parquet_batches
from papilio.data_pipeline.preprocess.bad_rows import PreprocessError
from papilio.data_pipeline.preprocess.engine import preprocess
from papilio.data_pipeline.preprocess.preprocess_options import PreprocessOptions
from papilio.data_pipeline.shards import open_shard
from tests.support.criteo_text import splitmix64

SCHEMA = """
label = "click"
dense = [{ name = "price" }, { name = "age", transform = "identity", missing_value = -1.0 }]

[[categorical]]
name = "city"
frequency_threshold = 2

[[categorical]]
name = "user"
kind = "integer"

[[categorical]]
name = "tags"
multi_hot = true
separator = "|"

[[categorical]]
name = "slot"
kind = "integer"
encoding = "identity"
num_buckets = 10

[[categorical]]
name = "code"
kind = "hex"
encoding = "hash"
num_buckets = 100
"""
HEADER = ["extra", "click", "price", "age", "city", "user", "tags", "slot", "code"]


def make_rows(num_rows: int) -> list[dict]:
    generator = np.random.default_rng(0)
    cities = ["Zürich", "Rome", "a,b", 'say "hi"', "", "Oslo"]
    rows = []
    for i in range(num_rows):
        rows.append(
            {
                "extra": "x",
                "click": int(generator.integers(2)),
                "price": None if i % 7 == 3 else round(float(generator.normal()), 3),
                "age": None if i % 5 == 0 else int(generator.integers(90)),
                "city": cities[generator.integers(6)] if i != 4 else "only once",
                "user": None if i % 9 == 1 else int(generator.integers(-5, 5)) * 2**40,
                "tags": [f"t{t}" for t in generator.integers(0, 6, generator.integers(4))],
                "slot": None if i % 11 == 2 else int(generator.integers(10)),
                "code": None if i % 13 == 2 else f"{generator.integers(2**32):x}",
            }
        )
    return rows


def quote(text: str, delimiter: str) -> str:
    return '"' + text.replace('"', '""') + '"' if delimiter in text or '"' in text else text


def write_text(path, rows: list[dict], delimiter: str, line_end: str = "\n") -> None:
    lines = [delimiter.join(HEADER)]
    for row in rows:
        fields = {**row, "tags": "|".join(row["tags"])}
        lines.append(delimiter.join(quote("" if fields[n] is None else str(fields[n]), delimiter) for n in HEADER))
    path.write_bytes(line_end.join(lines).encode() + b"\n")


def write_parquet(path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=70)


def options_for(tmp_path, path, output="out", **changes) -> PreprocessOptions:
    (tmp_path / "schema.toml").write_text(changes.pop("schema", SCHEMA))
    options = {"num_workers": 1, "show_progress": False, "fractions": (0.8, 0.1, 0.1), "split": "fraction"} | changes
    return PreprocessOptions(
        source="table",
        inputs=(str(path),),
        output=str(tmp_path / output),
        schema_path=str(tmp_path / "schema.toml"),
        **options,
    )


def vocabulary(values: list, threshold: int = 1) -> dict:
    counts = Counter(values)
    order = sorted((-count, v) for v, count in counts.items() if count >= threshold)
    return {v: 2 + rank for rank, (_, v) in enumerate(order)}


def oracle(rows: list[dict]) -> list[tuple]:
    """(label, dense, ids) of each row; vocabularies over the first 80 %."""
    train = rows[: round(len(rows) * 0.8)]
    city = vocabulary([r["city"].encode() for r in train if r["city"]], 2)
    user = vocabulary([r["user"] for r in train if r["user"] is not None])
    tags = vocabulary([t.encode() for r in train for t in r["tags"]])
    result = []
    for r in rows:
        price = 0.0 if r["price"] is None else math.log1p(max(r["price"], 0.0))
        dense = [price, -1.0 if r["age"] is None else float(r["age"])]
        ids = [
            1 if not r["city"] else city.get(r["city"].encode(), 0),
            1 if r["user"] is None else user.get(r["user"], 0),
            [tags.get(t.encode(), 0) for t in r["tags"]],
            1 if r["slot"] is None else 2 + r["slot"],
            1 if r["code"] is None else 2 + splitmix64(int(r["code"], 16)) % 98,
        ]
        result.append((r["click"], dense, ids))
    return result


def assert_equal_to_oracle(folder, rows: list[dict]) -> None:
    manifest = read_manifest(str(folder))
    found = []
    for split in ("train", "validation", "test"):
        for info in manifest.splits[split].shards:
            shard = open_shard(info, manifest.data_schema, str(folder))
            columns = []
            for bags in shard.bags:
                ids = bags.ids.tolist()
                bounds = None if bags.offsets is None else bags.offsets.tolist()
                columns.append(ids if bounds is None else [ids[a:b] for a, b in itertools.pairwise(bounds)])
            found += zip(
                shard.labels.tolist(), shard.dense.tolist(), map(list, zip(*columns, strict=True)), strict=True
            )
    wanted = oracle(rows)
    assert len(found) == len(wanted)
    for row, (label, dense, ids) in zip(found, wanted, strict=True):
        assert row == (label, np.array(dense, np.float32).tolist(), ids)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(byte_blocks.read_blocks, "__defaults__", (1_500,))
    monkeypatch.setattr(parquet_batches, "BATCH_ROWS", 50)


@pytest.mark.parametrize("form", ["csv", "csv.gz", "tsv", "tsv with CRLF", "parquet"])
def test_every_form_equals_the_oracle(tmp_path, small_pieces, form):
    rows = make_rows(300)
    path = tmp_path / f"rows.{form.split()[0]}"
    if form == "parquet":
        write_parquet(path, rows)
    else:
        write_text(path, rows, "," if "csv" in form else "\t", "\r\n" if "CRLF" in form else "\n")
    if form.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    manifest = preprocess(options_for(tmp_path, path))
    assert_equal_to_oracle(tmp_path / "out", rows)
    stats = manifest.categorical_stats
    assert stats["tags"].mean_ids_per_sample == sum(len(r["tags"]) for r in rows) / 300
    assert stats["tags"].missing_rate == sum(not r["tags"] for r in rows) / 300
    assert stats["slot"].num_embeddings == 12


@pytest.mark.parametrize("split", ["random", "days"])
def test_multi_hot_rows_stay_whole_in_other_splits(tmp_path, small_pieces, split):
    rows = make_rows(300)
    write_parquet(tmp_path / "rows.parquet", rows)
    manifest = preprocess(options_for(tmp_path, tmp_path / "rows.parquet", split=split))
    lengths = []
    for name in manifest.splits:
        for info in manifest.splits[name].shards:
            shard = open_shard(info, manifest.data_schema, str(tmp_path / "out"))
            tags, labels = np.diff(shard.bags[2].offsets).tolist(), shard.labels.tolist()
            lengths += zip(labels, shard.bags[3].ids.tolist(), tags, strict=True)
    wanted = [(r["click"], 1 if r["slot"] is None else 2 + r["slot"], len(r["tags"])) for r in rows]
    assert sorted(lengths) == sorted(wanted)


def test_serving_maps_raw_values_to_the_same_ids(tmp_path):
    rows = make_rows(200)
    write_parquet(tmp_path / "rows.parquet", rows)
    preprocess(options_for(tmp_path, tmp_path / "rows.parquet"))
    mappers = load_id_mappers(read_manifest(str(tmp_path / "out")), str(tmp_path / "out"))
    wanted = oracle(rows)
    for c, name in enumerate(["city", "user", "tags", "slot", "code"]):
        bags = mappers[name].map_values(pa.array([row[name] for row in rows]))
        if name == "tags":
            assert bags.ids.tolist() == [i for _, _, ids in wanted for i in ids[c]]
            assert np.diff(bags.offsets).tolist() == [len(row["tags"]) for row in rows]
        else:
            assert bags.ids.tolist() == [ids[c] for _, _, ids in wanted]
    with pytest.raises(ValueError, match="sample 1, feature slot: id 10 is out of range, must be 0 to 9"):
        mappers["slot"].map_values(pa.array([3, 10]))


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("click", b"2", "label is '2', must be 0 or 1"),
        ("click", b"", "label is ''|label is None"),
        ("price", b"cheap", "'cheap' is not a number"),
        ("price", b"inf", "infinite, must be a finite number"),
        ("user", b"1.5", "'1.5' is not a whole number"),
        ("slot", b"10", "id 10 is out of range, must be 0 to 9"),
        ("slot", b"-1", "id -1 is out of range"),
        ("code", b"xyz", "'xyz' is not an id of at most 8 hexadecimal digits"),
        ("city", b"\xff\xfe", r"'\\\\xff\\\\xfe' is not UTF-8 text"),
        ("tags", b"ok|\xff", r"'\\\\xff' is not UTF-8 text"),
        ("(row)", b"", "10 fields, the header has 9"),
    ],
)
def test_a_malformed_field_is_named(tmp_path, small_pieces, field, value, reason):
    rows = make_rows(100)
    path = tmp_path / "rows.tsv"
    write_text(path, rows, "\t")
    lines = path.read_bytes().split(b"\n")
    fields = lines[60].split(b"\t")
    if field == "(row)":
        fields.append(b"more")
    else:
        fields[HEADER.index(field)] = value
    lines[60] = b"\t".join(fields)
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(
        PreprocessError, match=rf"rows.tsv, line 61, field {field.replace('(row)', '.row.')}: ({reason})"
    ):
        preprocess(options_for(tmp_path, path))
    assert preprocess(options_for(tmp_path, path, max_bad_rows=1)).num_bad_rows == 1
    assert_equal_to_oracle(tmp_path / "out", rows[:59] + rows[60:])
    assert (tmp_path / "out" / "bad_rows.tsv").read_bytes().splitlines()[1].endswith(lines[60])


def test_a_malformed_parquet_row_is_numbered_across_batches(tmp_path, small_pieces):
    rows = make_rows(100)
    rows[76]["slot"] = 44
    write_parquet(tmp_path / "rows.parquet", rows)
    with pytest.raises(PreprocessError, match="line 77, field slot: id 44 is out of range"):
        preprocess(options_for(tmp_path, tmp_path / "rows.parquet"))


def test_files_that_cannot_be_used(tmp_path):
    rows = make_rows(50)
    write_text(tmp_path / "rows.csv", rows, ",")
    text = (tmp_path / "rows.csv").read_text()
    write_parquet(tmp_path / "rows.parquet", rows)
    parquet = (tmp_path / "rows.parquet").read_bytes()
    for name, data, message in [
        ("lacks.csv", text.replace("city", "town", 1).encode(), "lacks.csv has no column city; it has extra, click"),
        ("twice.csv", text.replace("extra", "city", 1).encode(), "twice.csv has several columns named city"),
        ("latin.csv", b"\xff" + text.encode(), "latin.csv, line 1: the header is not UTF-8 text"),
        ("header.csv", text.split("\n")[0].encode(), "header.csv holds no usable row"),
        (
            "lines.csv",
            text.replace("Rome", '"Ro\nme"', 1).encode(),
            "fields, the header has 9|quoted field holds a line",
        ),
        ("cut.parquet", parquet[:-100], "cut.parquet is damaged or truncated"),
        ("quote.csv", text.replace("Rome", '"Rome', 1).encode(), "quote.csv, near byte 0: "),
        ("rows.xlsx", b"x", "rows.xlsx must end in .csv, .tsv"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(PreprocessError, match=message):
            preprocess(options_for(tmp_path, tmp_path / name, f"out_{name}"))


def test_hashed_strings_and_missing_ones(tmp_path):
    rows = make_rows(50)
    write_parquet(tmp_path / "rows.parquet", rows)
    schema = SCHEMA.replace("frequency_threshold = 2", 'encoding = "hash"\nnum_buckets = 1000')
    preprocess(options_for(tmp_path, tmp_path / "rows.parquet", schema=schema, fractions=(1.0, 0.0, 0.0)))
    manifest = read_manifest(str(tmp_path / "out"))
    [shard] = [open_shard(i, manifest.data_schema, str(tmp_path / "out")) for i in manifest.splits["train"].shards]

    def fnv1a(data: bytes) -> int:
        value = 0xCBF29CE484222325
        for octet in data:
            value = (value ^ octet) * 0x100000001B3 % 2**64
        return value

    wanted = [2 + splitmix64(fnv1a(r["city"].encode())) % 998 if r["city"] else 1 for r in rows]
    assert shard.bags[0].ids.tolist() == wanted


def test_a_list_needs_multi_hot(tmp_path):
    write_parquet(tmp_path / "rows.parquet", make_rows(20))
    schema = SCHEMA.replace("multi_hot = true\n", "")
    with pytest.raises(
        PreprocessError,
        match=r"parquet: column tags is of type list<.*>, must hold text or integers; set multi_hot = true",
    ):
        preprocess(options_for(tmp_path, tmp_path / "rows.parquet", schema=schema))
