"""What a request unpacks to is known, and bounded, before it is unpacked."""

import struct

import pyarrow as pa
import pytest

from papilio.data_pipeline.id_mapper import IdMapper
from papilio.data_pipeline.schema import CategoricalColumn, DenseColumn, Schema
from papilio.trainer.inference.encoding.json_records import RequestError
from papilio.trainer.inference.encoding.request_encoder import RequestEncoder
from papilio.trainer.inference.serving.arrow_bodies import read_arrow
from papilio.trainer.inference.serving.http_messages import http_error_of, one_line, read_json
from papilio.trainer.inference.serving.request_limits import RequestLimits
from papilio.trainer.inference.serving.serve_options import ServeOptions
from tests.support.served import arrow_body, records_of

LIMITS = RequestLimits.of(ServeOptions(package="none"))
SEPARATORS = {"tags": "|"}
TAGS = CategoricalColumn(name="tags", kind="integer", encoding="identity", num_buckets=9, multi_hot=True)
SCHEMA = Schema(dense=(DenseColumn(name="x"),), categorical=(TAGS,))
LONG = "x" * 900_000


def stream(*batches: pa.RecordBatch, **options: object) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def column(array: pa.Array, name: str = "a", **options: object) -> bytes:
    return stream(pa.record_batch({name: array}), **options)


def dictionary(values: pa.Array, indices: list[int]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), values)


def views(count: int) -> pa.Array:
    """Views that all show the whole of one buffer."""
    view = struct.pack("<i4sii", len(LONG), b"xxxx", 0, 0)
    buffers = [None, pa.py_buffer(view * count), pa.py_buffer(LONG.encode())]
    return pa.Array.from_buffers(pa.string_view(), count, buffers)


def shared_lists() -> pa.Array:
    offsets, sizes = (pa.array([number] * 4000, pa.int32()) for number in (0, 10_000))
    return pa.ListViewArray.from_arrays(offsets, sizes, pa.array(range(10_000)))


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (lambda: column(pa.array(["\0" * (64 << 20)]), compression="zstd"), "would take 67,"),
        (lambda: column(pa.array(["\0" * (64 << 20)]), compression="lz4"), "would take 67,"),
        (lambda: column(dictionary(pa.array([LONG]), [0] * 1000)), "would take 90"),
        (lambda: column(dictionary(pa.array([LONG], pa.binary()), [0] * 1000)), "would take 90"),
        (lambda: column(pa.ListArray.from_arrays([0, 1000], dictionary(pa.array([LONG]), [0] * 1000))), "take 90"),
        (lambda: column(views(1000)), "would take 90"),
        (lambda: column(pa.FixedSizeListArray.from_arrays(dictionary(pa.array([LONG]), [0] * 1000), 10)), "take 90"),
        (lambda: column(pa.FixedSizeListArray.from_arrays(views(1000), 10)), "would take 90"),
        (lambda: column(pa.nulls(1 << 30)), "1,073,741,824 records, a request may have 4,096"),
        (lambda: column(pa.ListArray.from_arrays([0, 2**28], pa.nulls(2**28)), "tags"), "would take 17,179,"),
        (lambda: column(pa.FixedSizeListArray.from_arrays(pa.nulls(2**28), 2**28)), "would take 17,179,"),
        (
            lambda: column(pa.RunEndEncodedArray.from_arrays(pa.array([2**30], pa.int32()), [LONG])),
            "1,073,741,824 rec",
        ),
        (lambda: stream(*[pa.record_batch({"a": [1] * 600})] * 7), "4,200 records, a request may have 4,096"),
        (lambda: stream(*[pa.record_batch({"a": pa.array([], pa.int8())})] * 1025), "more than 1,024 record batches"),
        (lambda: column(pa.array([[1] * 16_385]), "tags"), "column tags: a bag of 16,385 ids, at most 16,384"),
        (lambda: column(pa.array(["7|" * 16_384]), "tags"), "column tags: a bag of 16,385 ids, at most 16,384"),
    ],
)
def test_what_would_become_too_large_is_refused_before_it_is(body, error) -> None:
    sent = body()
    before = pa.total_allocated_bytes()
    with pytest.raises(RequestError, match=error) as refused:
        read_arrow(sent, LIMITS, SEPARATORS)
    assert pa.total_allocated_bytes() - before < 20 << 20
    assert http_error_of(refused.value).status == 413


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (lambda: b"", "the body is not an Arrow IPC stream: "),
        (lambda: column(pa.array(["x"]))[:-9], "the body is not an Arrow IPC stream: "),
        (lambda: column(pa.array([{"b": 1}])), "column a is of type struct<b: int64>, must hold text or numbers"),
        (lambda: column(pa.array([[[1]]])), "column a is of type list<item: list<item: int64>>, must hold text"),
        (lambda: column(pa.RunEndEncodedArray.from_arrays([2], ["x"])), "column a is of type run_end_encoded"),
        (lambda: column(shared_lists()), "column a is of type list_view<item: int64>, must hold text or numbers"),
        (lambda: column(dictionary(pa.array([[1]]), [0])), "column a is of type dictionary<values=list"),
        (lambda: column(pa.array([b"0" * 16], pa.uuid())), "column a is of type extension<arrow.uuid>"),
    ],
)
def test_what_is_damaged_or_of_no_use_is_told(body, error) -> None:
    with pytest.raises(RequestError) as refused:
        read_arrow(body(), LIMITS, SEPARATORS)
    assert str(refused.value).startswith(error)
    assert http_error_of(refused.value).status == 400


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (dictionary(pa.array(["x", "yy"]), [0, 1, 1]), pa.string()),
        (dictionary(pa.array([5, 7]), [0, 1, 1]), pa.int64()),
        (pa.array(["x", "y" * 40, None], pa.string_view()), pa.large_string()),
        (pa.array([["x"], None, ["y" * 40]], pa.list_(pa.string_view())), pa.list_(pa.large_string())),
        (pa.array([["x", "y"], ["z", None]], pa.list_(pa.string_view(), 2)), pa.list_(pa.large_string())),
        (pa.ListArray.from_arrays([0, 1, 3], dictionary(pa.array(["x", "yy"]), [0, 1, 1])), pa.list_(pa.string())),
    ],
)
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_small_ones_are_read_as_plain_columns(array, kind, compression) -> None:
    table, num_bytes = read_arrow(column(array, compression=compression), LIMITS, SEPARATORS)
    assert table.column("a").type == kind
    assert table.column("a").to_pylist() == array.to_pylist()
    assert table.nbytes <= num_bytes < 20_000


def test_the_bytes_of_a_plain_table_are_counted_without_reading_it() -> None:
    batch = pa.record_batch({"a": pa.array(range(1000)), "b": ["12345678"] * 1000})
    for options in ({}, {"compression": "zstd"}):
        _, num_bytes = read_arrow(stream(batch, **options), LIMITS, {})
        assert num_bytes == 2 * 1000 * 64  # more than the 20 kB that they are
    table, _ = read_arrow(arrow_body(records_of(0, 50)), LIMITS, SEPARATORS)
    assert table.to_pylist() == records_of(0, 50)


def test_json_bags_and_records_are_bounded() -> None:
    limits = RequestLimits(max_records=2, max_bag_ids=3, max_bytes=256, max_waiting_bytes=1 << 20)
    for body, error in (
        (
            b'{"records": [{"tags": []}, {"tags": [1, 2, 3, 4]}]}',
            "record 1, column tags: a bag of 4 ids, at most 3 are",
        ),
        (b'{"records": [{"tags": "1 2 3 4"}]}', "record 0, column tags: a bag of 4 ids, at most 3 are allowed"),
        (b'{"records": [{"tags": [1,2,3]}, {"tags": [1,2]}]}', "the body would take 320 bytes in memory"),
        (b'{"records": [{}, {}, {}]}', "3 records, a request may have 2; send fewer in a request"),
    ):
        with pytest.raises(RequestError) as refused:
            read_json(body, SCHEMA, limits)
        assert str(refused.value).startswith(error)
        assert http_error_of(refused.value).status == 413
    assert len(read_json(b'{"records": [{"tags": "1 2 3"}, {"tags": [1]}]}', SCHEMA, limits)) == 2


@pytest.mark.parametrize(
    "body",
    [
        b'{"records": [{"%s": 1}]}' % (b"k" * 900_000),
        b'{"records": [], "%s": 1}' % (b"k" * 900_000),
        b'{"records": [{"%s": 1}]}' % (b"\\ud800\\n" * 9_000),
        b'{"records": ' + b"[" * 900_000,
        b"\xef\xbb\xbf{}",
        b'{"records": [' + b"9" * 5_000 + b"]}",
    ],
)
def test_what_is_quoted_of_a_request_is_short_and_printable(body) -> None:
    with pytest.raises(RequestError) as refused:
        read_json(body, SCHEMA, LIMITS)
    error = http_error_of(refused.value).body["error"]
    assert len(error) <= 500
    assert error.isprintable()


def test_values_that_are_quoted_are_short_and_printable() -> None:
    encoder = RequestEncoder(SCHEMA, {"tags": IdMapper(TAGS, None)})
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("\n\x1b" * 300_000, [1] * 300_000, deep, {"a": "b" * 300_000}):
        (reason,) = (reason for _, reason in encoder.encode_records([{"x": value}]).faults.values())
        assert len(reason) < 200
        assert one_line(reason).isprintable()
    while deep:  # taken apart by hand, for the interpreter's own way is recursive
        deep = deep.pop()
