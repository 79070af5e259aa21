import numpy as np
import pytest

from papilio.data_pipeline.preprocess import criteo
from papilio.data_pipeline.preprocess.byte_blocks import InputBlock, load_block
from papilio.data_pipeline.preprocess.criteo import decode_decimal, diagnose, parse_criteo
from papilio.data_pipeline.schema import criteo_schema

SCHEMA = criteo_schema()
GOOD = [b"1", *[b"5"] * 13, *[b"0000002a"] * 26]


def parse(text: bytes):
    return parse_criteo(load_block(InputBlock(0, 0, 0, len(text), text), ""), SCHEMA)


def row(**changed: bytes) -> bytes:
    """A good row with fields replaced: label, I1..I13, C1..C26."""
    names = [SCHEMA.label, *SCHEMA.dense_names, *SCHEMA.categorical_names]
    fields = list(GOOD)
    for name, value in changed.items():
        fields[names.index(name)] = value
    return b"\t".join(fields)


def ids_of(chunk, c: int) -> list[int | None]:
    keys = [*chunk.columns[c].keys.tolist(), None]
    return [keys[code] for code in chunk.columns[c].codes.tolist()]


def test_integers_of_every_length_and_sign():
    texts = [
        b"0",
        b"-1",
        b"-2",
        b"-3",
        b"",
        b"7",
        b"99",
        b"12345678",
        b"-12345678",
        b"123456789",
        b"9223372036854775807",
        b"-9223372036854775807",
        b"0" * 5000 + b"12",
    ]
    chunk = parse(b"\n".join(row(I3=text) for text in texts))
    wanted = np.log1p([max(float(text or 0), 0.0) for text in texts]).astype(np.float32)
    np.testing.assert_array_equal(chunk.dense[:, 2], wanted)
    assert chunk.num_missing.tolist() == [0, 0, 1] + [0] * 10


def test_decimal_words_equal_int():
    texts = [b"00000000", b"00000001", b"12345678", b"99999999"]
    words = np.frombuffer(b"".join(texts), np.uint64) ^ np.uint64(0x3030303030303030)
    assert decode_decimal(words).tolist() == [0, 1, 12345678, 99999999]


def test_ids_of_every_length_and_case():
    texts = [b"", b"0", b"f", b"AbCd", b"1234567", b"deadBEEF", b"ffffffff", b"00000000", b"0000000a"]
    chunk = parse(b"\n".join(row(C1=text, C26=text) for text in texts))
    wanted = [int(text, 16) if text else None for text in texts]
    assert ids_of(chunk, 0) == ids_of(chunk, 25) == wanted
    assert chunk.columns[0].counts[-1] == 1


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("has_last_line_end", [True, False])
def test_line_ends_and_blank_last_fields(line_end, has_last_line_end):
    text = line_end.join([row(C26=b""), row(), row(C25=b"", C26=b"")]) + line_end * has_last_line_end
    chunk = parse(text)
    assert (chunk.num_lines, len(chunk.bad_rows)) == (3, 0)
    assert ids_of(chunk, 25) == [None, 42, None]
    assert ids_of(chunk, 24) == [42, 42, None]


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        (row(label=b"2"), "label", "label is '2', must be 0 or 1"),
        (row(label=b""), "label", "label is ''"),
        (row(label=b"01"), "label", "label is '01'"),
        (row(I4=b"x"), "I4", "'x' is not a whole number"),
        (row(I4=b"1.5"), "I4", "'1.5' is not a whole number"),
        (row(I4=b"a"), "I4", "'a' is not a whole number"),
        (row(I4=b"-"), "I4", "'-' is not a whole number"),
        (row(I4=b"--1"), "I4", "'--1' is not"),
        (row(I4=b"1-"), "I4", "'1-' is not"),
        (row(I4=b"12345678x"), "I4", "'12345678x' is not"),
        (row(I4=b"9223372036854775808"), "I4", "at most 64 bits"),
        (row(I4=b"9" * 5000), "I4", "at most 64 bits"),
        (row(C9=b"123456789"), "C9", "'123456789' is not an id of at most 8 hexadecimal digits"),
        (row(C9=b"0000000g"), "C9", "'0000000g' is not an id"),
        (row(C9=b"-1"), "C9", "'-1' is not an id"),
        (row(C9=b"ab\r"), "C9", r"'ab\r' is not an id"),
        (row(C9=b"\xff\xfe"), "C9", r"b'\xff\xfe' is not UTF-8 text"),
        (row(I4=b"\xff"), "I4", r"b'\xff' is not UTF-8 text"),
        (row() + b"\t", "(row)", "41 fields, a Criteo row has 40"),
        (b" ", "(row)", "1 fields"),
        (b"a\rb", "(row)", "lines must end in"),
    ],
)
def test_a_malformed_row_is_set_aside_and_named(line, field, reason):
    chunk = parse(b"\n".join([row(), line, row(C1=b"7")]) + b"\n")
    assert chunk.num_lines == 3
    assert [(bad.line, bad.field) for bad in chunk.bad_rows] == [(2, field)]
    assert reason in chunk.bad_rows[0].reason
    assert chunk.bad_rows[0].raw == line + b"\n"
    assert ids_of(chunk, 0) == [42, 7]


def test_every_single_byte_in_every_kind_of_field_is_accepted_or_named():
    """Each row with one odd byte is refused exactly when the plain statement of the format refuses it."""
    for field, allowed in [("label", b"01"), ("I1", b"0123456789"), ("C1", b"0123456789abcdefABCDEF")]:
        octets = [bytes([octet]) for octet in range(256) if octet not in b"\t\n"]
        chunk = parse(b"\n".join(row(**{field: octet}) for octet in octets) + b"\n")
        assert [bad.line - 1 for bad in chunk.bad_rows] == [i for i, octet in enumerate(octets) if octet not in allowed]


def test_lines_are_numbered_across_slices(monkeypatch):
    monkeypatch.setattr(criteo, "_SLICE_BYTES", 700)
    lines = [row() for _ in range(50)]
    lines[10], lines[11], lines[49] = b"a\tb", row(C3=b"zz"), b"c"
    chunk = parse(b"\n".join(lines) + b"\n")
    assert [bad.line for bad in chunk.bad_rows] == [11, 12, 50]
    assert (chunk.num_lines, len(chunk.labels)) == (50, 47)


def test_blank_lines_are_no_rows_and_keep_their_numbers():
    chunk = parse(b"\n" + row() + b"\n\r\n\nx\n" + row() + b"\n\n")
    assert chunk.line_numbers.tolist() == [2, 6]
    assert [bad.line for bad in chunk.bad_rows] == [5]
    assert chunk.num_lines == 7


def test_a_block_of_bad_rows_only_is_empty():
    chunk = parse(b"x\ny\n")
    assert (len(chunk.labels), len(chunk.bad_rows), chunk.dense.shape) == (0, 2, (0, 13))


def test_diagnose_names_the_first_fault():
    assert diagnose(row(I2=b"q", C2=b"q") + b"\r\n", SCHEMA)[0] == "I2"
