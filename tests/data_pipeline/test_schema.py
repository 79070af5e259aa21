from pathlib import Path

import pytest

from papilio.data_pipeline.schema import (
    MISSING_ID,
    NUM_RESERVED_IDS,
    UNKNOWN_ID,
    CategoricalColumn,
    Schema,
    SchemaError,
    criteo_schema,
    load_schema,
)


def test_schema_file_gives_the_columns_in_order(tmp_path: Path) -> None:
    path = tmp_path / "schema.toml"
    path.write_text(
        """
        label = "clicked"
        dense = [{name = "age", transform = "identity", missing_value = -1.0}, {name = "price"}]
        [[categorical]]
        name = "user"
        kind = "integer"
        encoding = "hash"
        num_buckets = 1000
        [[categorical]]
        name = "tags"
        multi_hot = true
        separator = "|"
        frequency_threshold = 3
        """
    )
    schema = load_schema(path)
    assert schema.label == "clicked"
    assert schema.dense_names == ["age", "price"]
    assert [(column.transform, column.missing_value) for column in schema.dense] == [("identity", -1.0), ("log1p", 0.0)]
    assert schema.categorical_names == ["user", "tags"]
    user, tags = schema.categorical
    assert (user.kind, user.encoding, user.num_buckets, user.multi_hot) == ("integer", "hash", 1000, False)
    assert (tags.kind, tags.encoding, tags.frequency_threshold, tags.separator) == ("string", "vocabulary", 3, "|")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label = [", "is not TOML"),
        ('label = "y"', "categorical is missing; add it"),
        ("categorical = []", r"categorical = \[\]: Tuple should have at least 1 item"),
        (
            'categorical = [{name = "u"}, {name = "v", frequncy_threshold = 3}]',
            r"no key categorical.1.frequncy_threshold \(of v\); did you mean categorical.1.frequency_",
        ),
        ('lable = "y"\ncategorical = [{name = "u"}]', "toml: there is no key lable; did you mean label\\?$"),
        ('catgorical = [{name = "u"}]', "categorical is missing; add it; there is no key catgorical; did you mean cat"),
        (
            'dense = [{nam = "x"}]\ncategorical = [{name = "u"}]',
            "dense.0.name is missing; .* did you mean dense.0",
        ),
        ('categorical = "user"', 'categorical = "user": Input should be a valid tuple'),
        ('categorical = ["user"]', 'categorical.0 = "user": Input should be a valid dictionary'),
        ("categorical = [{name = 3}]", "categorical.0.name = 3: Input should be a valid string"),
        ("x = " + "[" * 100_000 + "]" * 100_000, "is not TOML: values nested far too deep"),
        (".".join("a" * 3_000) + " = 1", "categorical is missing; add it; there is no key a; known: label, dense"),
        ("x = " + "1" * 5_000, "is not TOML: Exceeds the limit"),
        (
            f'categorical = [{{name = "u", kind = "{"k" * 9_000}"}}]',
            'categorical.0.kind .of u. = "k{78}…: Input should',
        ),
        ('categorical = [{name = ""}]', "column '': the name is empty; rename it"),
        ('categorical = [{name = "a\\u0000"}]', r"column 'a\\x00': the name holds a control character; rename it"),
        (f'dense = [{{name = "{"é" * 40}"}}]\ncategorical = [{{name = "u"}}]', "the name is too long: 240 bytes when"),
        ('categorical = [{name = "u", encoding = "hash"}]', "encoding = 'hash' needs num_buckets"),
        ('categorical = [{name = "u", frequency_threshold = 0}]', r"frequency_threshold \(of u\) = 0: .* greater than"),
        (
            'categorical = [{name = "u", encoding = "hash", num_buckets = 2}]',
            "num_buckets is 2, must be above the 2 reserved",
        ),
        (
            'categorical = [{name = "u", encoding = "identity", num_buckets = 9}]',
            "encoding = 'identity' takes row numbers; set kind = 'integer'",
        ),
        (
            'categorical = [{name = "u", kind = "integer", encoding = "identity", num_buckets = 2147483646}]',
            "num_buckets is 2147483646, must be at most 2147483645",
        ),
        (
            'dense = [{name = "x", missing_value = nan}]\ncategorical = [{name = "u"}]',
            "missing_value is nan, must be a finite number of 32 bits",
        ),
        (
            'dense = [{name = "x", missing_value = 1e39}]\ncategorical = [{name = "u"}]',
            r"missing_value is 1e\+39, must be a finite number of 32 bits",
        ),
        ('dense = [{name = "u"}]\ncategorical = [{name = "u"}]', "names must differ; repeated: u"),
        (
            'dense = [{name = "x", transform = "sqrt"}]\ncategorical = [{name = "u"}]',
            r"dense.0.transform \(of x\) = \"sqrt\": .*'log1p' or 'identity'",
        ),
    ],
)
def test_wrong_schema_file_is_refused_by_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "schema.toml"
    path.write_text(text)
    with pytest.raises(SchemaError, match=message) as caught:
        load_schema(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(path))


def test_a_schema_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"none\.toml does not exist"):
        load_schema(tmp_path / "none.toml")
    with pytest.raises(SchemaError, match="is a folder, not a file"):
        load_schema(tmp_path)
    (tmp_path / "latin.toml").write_bytes('label = "größe"'.encode("latin-1"))
    with pytest.raises(SchemaError, match=r"latin\.toml is not UTF-8 text \(invalid start byte at byte 11\); save"):
        load_schema(tmp_path / "latin.toml")
    (tmp_path / "loop.toml").symlink_to(tmp_path / "loop.toml")
    with pytest.raises(SchemaError, match=r"loop\.toml cannot be read \(Too many levels of symbolic links\)"):
        load_schema(tmp_path / "loop.toml")


def test_criteo_schema_has_the_columns_of_the_logs() -> None:
    schema = criteo_schema(frequency_threshold=10)
    assert schema.dense_names == [f"I{i}" for i in range(1, 14)]
    assert schema.categorical_names == [f"C{i}" for i in range(1, 27)]
    assert {(c.kind, c.encoding, c.frequency_threshold) for c in schema.categorical} == {("hex", "vocabulary", 10)}
    assert {(c.encoding, c.num_buckets) for c in criteo_schema(num_buckets=500).categorical} == {("hash", 500)}


def test_reserved_ids_lie_below_all_others() -> None:
    assert sorted((UNKNOWN_ID, MISSING_ID)) == list(range(NUM_RESERVED_IDS))


def test_schema_survives_json() -> None:
    schema = Schema(categorical=(CategoricalColumn(name="u", multi_hot=True),))
    assert Schema.model_validate_json(schema.model_dump_json()) == schema
