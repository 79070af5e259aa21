"""One rule from a raw value to a key: the expected keys below are written by hand, the forms are all there are."""

import decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from papilio.data_pipeline.arrow_types import type_fault
from papilio.data_pipeline.preprocess.bad_rows import PreprocessError
from papilio.data_pipeline.preprocess.byte_blocks import PADDING_BYTES, InputBlock, load_block
from papilio.data_pipeline.preprocess.table_columns import categorical_codes, dense_values, labels_of
from papilio.data_pipeline.preprocess.table_source import parse_header, parse_text_block, read_parquet_batches
from papilio.data_pipeline.raw_values import Faults, is_printed_list
from papilio.data_pipeline.schema import CategoricalColumn, DenseColumn, Schema

STRING = CategoricalColumn(name="c")
INTEGER = CategoricalColumn(name="c", kind="integer")
HEX = CategoricalColumn(name="c", kind="hex")
NAN = float("nan")


def keys_of(array: pa.Array, column: CategoricalColumn) -> list[object]:
    """The key of each value, None for a missing one, the reason for a malformed one; bags as lists."""
    faults = Faults()
    codes = categorical_codes(array, column, faults)
    keys = codes.keys.tolist() if isinstance(codes.keys, np.ndarray) else [k.decode() for k in codes.keys.to_pylist()]
    assert keys == sorted(set(keys))
    values = [[*keys, None][code] for code in codes.codes.tolist()]
    if codes.lengths is not None:
        ends = np.cumsum(codes.lengths)
        values = [values[end - length : end] for end, length in zip(ends, codes.lengths.tolist(), strict=True)]
    for row, (name, reason) in faults.first_of_row.items():
        assert name == "c"
        values[row] = reason
    return values


@pytest.mark.parametrize(
    "array",
    [
        pa.array(["3", "3.0", "-0.0", None, "12345678901.0", "nan", "NaN", ""]).cast(pa.binary()),
        pa.array(["3", "3.0", "-0.0", None, "1.2345678901e+10", "nan", "NaN", ""], pa.string_view()),
        pa.array([3, 3, -0.0, None, 12345678901, NAN, NAN, None], pa.float64()),
        pa.array(["3", "3.0", "0.0", None, "1.2345678901E10", "-nan", "NaN", ""]).dictionary_encode(),
        pa.array([decimal.Decimal(3)] * 2 + [0, None, 12345678901, None, None, None], pa.decimal128(20, 2)),
        pa.array([3, 3, 0, None, 12345678901, None, None, None], pa.uint64()),
    ],
    ids=lambda array: str(array.type),
)
def test_a_whole_float_is_the_integer_and_nan_is_missing(array) -> None:
    numbers = [3, 3, 0, None, 12345678901, None, None, None]
    assert keys_of(array, INTEGER) == numbers
    assert keys_of(array, STRING) == [None if n is None else str(n) for n in numbers]
    bags = pa.array([array.to_pylist(), None, []], pa.list_(array.type))
    for column, expected in [(INTEGER, [3, 3, 0, 12345678901]), (STRING, ["3", "3", "0", "12345678901"])]:
        assert keys_of(bags, column.model_copy(update={"multi_hot": True})) == [expected, [], []]


def test_hex_reads_digits_from_text_and_numbers_from_the_rest() -> None:
    assert keys_of(pa.array(["10", "ff", "", "nan", None]), HEX) == [16, 255, None, None, None]
    assert keys_of(pa.array([10, 255.0, NAN, None], pa.float32()), HEX) == [10, 255, None, None]
    assert keys_of(pa.array(["10.0"]), HEX) == ["'10.0' is not an id of at most 8 hexadecimal digits"]


def test_a_float_that_may_be_several_ids_is_none() -> None:
    exact, beyond = 2.0**53 - 1, 2.0**53
    for column in (STRING, INTEGER):
        reasons = keys_of(pa.array([exact, beyond, -beyond, 1.5, float("inf")]), column)
        assert reasons[0] == (str(2**53 - 1) if column is STRING else 2**53 - 1)
        assert "9007199254740992.0 is a float beyond 9007199254740991, where several ids become one" in reasons[1]
        assert "write ids as integers or text" in reasons[2]
        assert reasons[3:] == ["1.5 is not a whole number of 64 bits", "inf is not a whole number of 64 bits"]
        assert "'9007199254740992.0' is a float beyond" in keys_of(pa.array(["9007199254740992.0"]), column)[0]
        assert "is a float beyond 16777215" in keys_of(pa.array([2.0**24], pa.float32()), column)[0]
    assert keys_of(pa.array(["9007199254740993"]), INTEGER) == [2**53 + 1]


def test_other_text_is_the_id_as_it_stands() -> None:
    texts = ["007", "007.0", "1.5", "12e4", "1.", "+5", " 3.0", "NAN", "null", "inf", "1.0.0", "\0", "9" * 5000]
    assert keys_of(pa.array(texts), STRING) == texts


def test_text_of_integers_is_decimal_digits() -> None:
    wrong = ["0x10", "9" * 5000, "1e5", "+5", " 5", "9223372036854775808", "\u0661", "1_0", "-", "1.5", "5.5e+30"]
    found = keys_of(pa.array([*wrong, "0" * 5000 + "7", "-9223372036854775808"]), INTEGER)
    assert found[-2:] == [7, -(2**63)]
    assert found[0] == "'0x10' is not a whole number of 64 bits"
    assert all("is not a whole number of 64 bits" in reason or "float beyond" in reason for reason in found[:-2])
    assert max(map(len, found[:-2])) < 200
    assert keys_of(pa.array([2**63], pa.uint64()), INTEGER) == ["9223372036854775808 is not a whole number of 64 bits"]
    assert keys_of(pa.array([2**63], pa.uint64()), STRING) == ["9223372036854775808"]


PRINTED = ["[5, 1]", "['a' 'b']", "(1,2)", "(1,)", "{1,2}", '["a"]', " [5] ", "[]", "()", "{}", "[[1], [2]]", "['a]b']"]
PRINTED += ["{'a': [1]}", "array([1, 2])", "array([1], dtype=int64)", "set()", "frozenset({1})", "tensor([3])"]


@pytest.mark.parametrize("text", PRINTED)
def test_a_printed_list_is_no_bag(text) -> None:
    column = STRING.model_copy(update={"multi_hot": True})
    assert is_printed_list(text)
    [reason, sound] = keys_of(pa.array([text, "a b"]), column)
    assert reason.startswith(f"{text!r} is a printed list; write its ids with ' ' between them and no brackets")
    assert sound == ["a", "b"]


@pytest.mark.parametrize(
    "text", ["[CLS] a [SEP]", "a [b]", "[a", "a]", "f(x) g(y)", "main()", "", "[", ":)", "(a) b (c)"]
)
def test_brackets_within_a_bag_are_part_of_its_ids(text) -> None:
    assert keys_of(pa.array([text]), STRING.model_copy(update={"multi_hot": True})) == [text.split()]


def test_numbers_that_do_not_fit_32_bits_are_malformed() -> None:
    column = DenseColumn(name="x", transform="identity", missing_value=-1.0)
    wrong = ["1e39", "-1e39", "3.4028236e38", "1e400", "-inf", "9" * 5000]
    for array in (pa.array([*wrong, "3.4028235e38", "nan", "", None]), pa.array([*map(float, wrong), NAN, 3.4e38])):
        faults = Faults()
        values, num_missing, _ = dense_values(array, column, faults)
        assert sorted(faults.first_of_row) == [0, 1, 2, 3, 4, 5]
        assert faults.first_of_row[1] == ("x", "-1e+39 is too large for 32 bits, must be between -3.4e38 and 3.4e38")
        assert faults.first_of_row[3] == ("x", "infinite, must be a finite number")
        assert np.isfinite(values[6:]).all()
        assert num_missing == (3 if array.type == pa.string() else 1)
    faults = Faults()
    dense_values(pa.array([1e39, -1e39]), DenseColumn(name="x"), faults)
    assert faults.first_of_row == {}  # its logarithm fits
    values, _, _ = dense_values(pa.array([2**60 + 1, None]), column, faults)
    assert values.tolist() == [2.0**60, -1.0]


def test_labels_are_0_and_1_of_any_type() -> None:
    faults = Faults()
    for array in (pa.array([True, False]), pa.array(["1.0", "0"]), pa.array([1, 0], pa.float16())):
        assert labels_of(array, "y", faults).tolist() == [1, 0]
    assert faults.first_of_row == {}
    labels_of(pa.array(["yes" * 100, None, "nan", "2", "1e-400", "0x1"]), "y", faults)
    assert sorted(faults.first_of_row) == [0, 1, 2, 3, 5]
    assert faults.first_of_row[3] == ("y", "label is '2', must be 0 or 1")
    assert len(faults.first_of_row[0][1]) < 100


WRONG_TYPES = [
    pa.timestamp("us"),
    pa.timestamp("ns", "UTC"),
    pa.date32(),
    pa.date64(),
    pa.time32("s"),
    pa.time64("us"),
    pa.duration("s"),
    pa.month_day_nano_interval(),
    pa.struct([("id", pa.int64())]),
    pa.map_(pa.string(), pa.int64()),
    pa.list_(pa.list_(pa.int64())),
    pa.list_(pa.struct([("id", pa.int64())])),
    pa.list_(pa.timestamp("s")),
    pa.list_(pa.bool_()),
    pa.dense_union([pa.field("a", pa.int64())]),
    pa.binary(16),
    pa.uuid(),
    pa.dictionary(pa.int8(), pa.timestamp("s")),
    pa.run_end_encoded(pa.int32(), pa.date32()),
]
TEXTS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.binary_view()]
NUMBERS = [pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.decimal256(30, 2)]


@pytest.mark.parametrize("role", ["label", "dense", "id", "bag"])
def test_every_type_is_taken_or_refused_by_its_name(role) -> None:
    for data_type in WRONG_TYPES:
        fault = type_fault(data_type, "c", role)
        assert fault is not None and fault.startswith(f"column c is of type {data_type}, must hold "), data_type
        assert "; " in fault and "\n" not in fault
    for data_type in [*TEXTS, *NUMBERS, pa.dictionary(pa.int8(), pa.string()), pa.null()]:
        is_number = data_type in NUMBERS
        assert (type_fault(data_type, "c", role) is None) == (role != "bag" or not is_number)
        lists = [pa.list_, pa.large_list, pa.list_view, pa.large_list_view, lambda t: pa.list_(t, 2)]
        for make in lists:
            assert (type_fault(make(data_type), "c", role) is None) == (role == "bag")
    assert (type_fault(pa.bool_(), "c", role) is None) == (role == "label")
    wide = pa.struct([(f"field_{i}", pa.int64()) for i in range(500)])
    assert len(type_fault(wide, "c", role) or "") < 300


@pytest.mark.parametrize("element", [*TEXTS, pa.uint8(), pa.float16(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_lists_of_every_layout_are_bags(element) -> None:
    is_text = element in TEXTS or pa.types.is_dictionary(element)
    one, two = ("1", "2") if is_text else (1, 2)
    column = STRING.model_copy(update={"multi_hot": True})
    for make in (pa.list_, pa.large_list, pa.list_view, pa.large_list_view, lambda t: pa.list_(t, 2)):
        array = pa.array([[two, two], [one, two], None, [None, one]], make(element))
        assert keys_of(array[1:], column) == [["1", "2"], [], ["1"]]
    assert keys_of(pa.nulls(2), column) == keys_of(pa.nulls(2, pa.list_(pa.null())), column) == [[], []]
    assert keys_of(pa.nulls(2), STRING) == keys_of(pa.nulls(2), INTEGER) == [None, None]


SCHEMA = Schema(label="y", dense=(DenseColumn(name="x"),), categorical=(STRING,))


def test_a_parquet_column_of_a_wrong_type_is_refused_with_its_file(tmp_path) -> None:
    path = str(tmp_path / "t.parquet")
    for name, array in [("x", pa.array([1], pa.timestamp("us"))), ("c", pa.array([{"id": 1}])), ("y", pa.array([[1]]))]:
        pq.write_table(pa.table({"y": [1], "x": [1], "c": ["a"]} | {name: array}), path)
        with pytest.raises(PreprocessError, match=rf"t.parquet: column {name} is of type .*, must hold"):
            next(read_parquet_batches(path, SCHEMA))


def parse(text: bytes, header: tuple[str, ...] = ("y", "x", "c")):
    buffer = load_block(InputBlock(0, 0, 0, len(text), text), "")
    return parse_text_block(buffer, header, ",", SCHEMA, starts_file=True)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_blank_line_is_no_row_and_keeps_its_number(end) -> None:
    chunk = parse(end.join([b"y,x,c", b"", b"1,2,a", b"", b"", b"2,2,b", b"0,1", b"0,3,", b"", b""]))
    assert chunk.labels.tolist() == [1, 0]
    assert chunk.line_numbers.tolist() == [3, 8]
    assert [(row.line, row.field) for row in chunk.bad_rows] == [(6, "y"), (7, "(row)")]
    assert chunk.num_lines == 9
    one_column = Schema(label="y", categorical=(STRING,))
    text = b"c\na\n\nb\n"
    chunk = parse_text_block(
        load_block(InputBlock(0, 0, 0, len(text), text), ""), ("c",), ",", one_column, starts_file=True
    )
    assert chunk.columns[0].counts.tolist() == [1, 1, 1]  # a, b, and one that is missing


def test_carriage_returns_that_end_no_line_are_named(tmp_path) -> None:
    with pytest.raises(PreprocessError, match=r"line 3 from there holds a carriage return: lines must end in .*tr"):
        parse(b"y,x,c\n1,2,a\n1,2,a\r1,2,b\r0,1,c\n")
    with pytest.raises(PreprocessError, match=r"t.csv, line 1: the header holds a carriage return: lines must end in"):
        parse_header(b"y,x,c\r1,2,a\r", "t.csv", SCHEMA)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'y,x,"c\n', "line 1: the header holds a quote that is not closed"),
        (b"y,x,c," + b"z" * 200_000 + b"\n", "line 1: the header is no line of column names .*field larger"),
        (b"y,x," + b"z," * 5_000 + b"\n", "has no column c; it has y, x, z"),
    ],
)
def test_a_header_that_is_none_is_refused(line, message) -> None:
    with pytest.raises(PreprocessError, match=message) as error:
        parse_header(line, "t.csv", SCHEMA)
    assert len(str(error.value)) < 700


_HEADER = ("label", "age", "user", "title")


def _text_block(text: bytes):
    schema = Schema(
        dense=(DenseColumn(name="age"),), categorical=(CategoricalColumn(name="user"), CategoricalColumn(name="title"))
    )
    buffer = np.frombuffer(bytes(PADDING_BYTES) + text, np.uint8)
    return parse_text_block(buffer, _HEADER, ",", schema, starts_file=False)


def test_a_row_of_too_few_fields_that_is_not_utf8_is_set_aside_as_any_other(capfd) -> None:
    chunk = _text_block(b"1,2,a,b\n1,2,a\xff\n1,2,\xfe,c\n0,3,b,d,\xff\n0,3,b,d\n")
    assert [(row.line, row.field, row.reason, row.raw) for row in chunk.bad_rows] == [
        (2, "(row)", "3 fields, the header has 4", b"1,2,a\xff\n"),
        (3, "user", "'\\\\xfe' is not UTF-8 text", b"1,2,\xfe,c\n"),
        (4, "(row)", "5 fields, the header has 4", b"0,3,b,d,\xff\n"),
    ]
    assert (chunk.line_numbers.tolist(), chunk.labels.tolist()) == ([1, 5], [1, 0])
    assert capfd.readouterr().err == ""


def test_a_quoted_line_break_is_not_made_up_for_by_a_stray_carriage_return() -> None:
    with pytest.raises(PreprocessError, match="line 3 from there holds a carriage return"):
        _text_block(b'1,2,a,"b\nc"\n1,2,a,b\r0,3,b,d\n')
    with pytest.raises(PreprocessError, match="line 2 from there holds a carriage return"):
        _text_block(b"1,2,a,b\n1,2,a,b\r\r\n")
    with pytest.raises(PreprocessError, match="line 2 from there holds a carriage return"):
        _text_block(b"1,2,a,\xff\n0,3\rb,d\n0,3,b,d\n")  # two rows of the wrong width are no two lines


def test_a_byte_order_mark_at_the_start_of_a_block_is_part_of_its_first_field() -> None:
    chunk = _text_block(b"\xef\xbb\xbf1,2,a,b\n0,2,a,b\n")
    assert [(row.line, row.reason) for row in chunk.bad_rows] == [(1, "'\\ufeff1' is not a number")]
