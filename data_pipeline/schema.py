"""What a data set's columns mean: label, dense and categorical features, and how raw values become numbers."""

from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from papilio.data_pipeline.toml_model import TomlError, explain, read_toml

# Bumped when any transform or id rule below changes its result; a package or a data set says which one it holds.
TRANSFORM_VERSION = 2

UNKNOWN_ID = 0  # rare ids (below the frequency threshold) and ids never seen in preprocessing share this row
MISSING_ID = 1  # an empty field of a one-hot feature; an empty multi-hot field is an empty bag
NUM_RESERVED_IDS = 2

DenseTransform = Literal["log1p", "identity"]
Encoding = Literal["vocabulary", "hash", "identity"]
ValueKind = Literal["hex", "string", "integer"]
Role = Literal["label", "dense", "id", "bag"]

# A file's name has 255 bytes at most, of which a suffix takes some.
_MAX_NAME_BYTES = 220
_MAX_FLOAT32 = (2 - 2**-23) * 2.0**127
_MAX_ROWS = 2**31 - 1
_DENSE: Role = "dense"


class SchemaError(ValueError):
    """A schema file that cannot be used; the message names the key and the fix."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DenseColumn(_Section):
    """A numeric input: `transform` is applied to the raw number, `missing_value` stands for an empty field."""

    name: str
    transform: DenseTransform = "log1p"
    missing_value: float = 0.0

    @model_validator(mode="after")
    def _check_missing_value(self) -> DenseColumn:
        if not abs(self.missing_value) <= _MAX_FLOAT32:  # also false of NaN
            raise ValueError(f"missing_value is {self.missing_value}, must be a finite number of 32 bits")
        return self


class CategoricalColumn(_Section):
    """A categorical input, one id a sample, or a list of ids when `multi_hot`.

    `encoding` says how raw values become rows: `vocabulary` (exact ids, those seen fewer than `frequency_threshold`
    times share row 0, at most `max_ids` kept, the most frequent first), `hash` (stateless, `num_buckets` rows in all)
    or `identity` (the raw integers, all below `num_buckets`, are row numbers once NUM_RESERVED_IDS is added).
    """

    name: str
    multi_hot: bool = False
    kind: ValueKind = "string"
    encoding: Encoding = "vocabulary"
    frequency_threshold: int = Field(default=1, ge=1)
    max_ids: int = Field(default=40_000_000, ge=1, le=_MAX_ROWS - NUM_RESERVED_IDS)
    num_buckets: int | None = Field(default=None, ge=1, le=_MAX_ROWS)
    separator: str = Field(default=" ", min_length=1, max_length=1)

    @model_validator(mode="after")
    def _check_buckets(self) -> CategoricalColumn:
        if self.encoding != "vocabulary" and self.num_buckets is None:
            raise ValueError(f"encoding = {self.encoding!r} needs num_buckets, the number of rows of the table")
        if self.encoding == "hash" and (self.num_buckets or 0) <= NUM_RESERVED_IDS:
            raise ValueError(f"num_buckets is {self.num_buckets}, must be above the {NUM_RESERVED_IDS} reserved rows")
        if self.encoding == "identity":
            self._check_identity()
        return self

    def _check_identity(self) -> None:
        if self.kind == "string":
            raise ValueError("encoding = 'identity' takes row numbers; set kind = 'integer', or another encoding")
        if self.num_fixed_rows > _MAX_ROWS:
            raise ValueError(f"num_buckets is {self.num_buckets}, must be at most {_MAX_ROWS - NUM_RESERVED_IDS}")

    @property
    def num_fixed_rows(self) -> int:
        """Rows of the table of a hash or identity column, the reserved ones included; 0 for a vocabulary."""
        if self.encoding == "vocabulary":
            return 0
        return (self.num_buckets or 0) + (NUM_RESERVED_IDS if self.encoding == "identity" else 0)


class Schema(_Section):
    """All columns of a data set, in the order the model sees them."""

    label: str = "label"
    dense: tuple[DenseColumn, ...] = ()
    categorical: tuple[CategoricalColumn, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_names(self) -> Schema:
        names = [self.label, *self.dense_names, *self.categorical_names]
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise ValueError(f"column names must differ; repeated: {', '.join(repeated)}")
        return self

    def roles(self) -> dict[str, Role]:
        """What each column is for."""
        categorical: dict[str, Role] = {c.name: "bag" if c.multi_hot else "id" for c in self.categorical}
        return {self.label: "label", **dict.fromkeys(self.dense_names, _DENSE), **categorical}

    @property
    def dense_names(self) -> list[str]:
        """Names of the dense columns, in order."""
        return [column.name for column in self.dense]

    @property
    def categorical_names(self) -> list[str]:
        """Names of the categorical columns, in order."""
        return [column.name for column in self.categorical]


def load_schema(path: str | Path) -> Schema:
    """Read a schema from a TOML file.

    Raises:
        SchemaError: the file is missing, is not TOML, or has a wrong key or value (the message names it).
    """
    try:
        tree = read_toml(path)
    except TomlError as error:
        raise SchemaError(f"schema file {path} {error}") from None
    try:
        schema = Schema.model_validate(tree)
    except ValidationError as error:
        raise SchemaError(f"schema file {path}: {explain(error, Schema, tree)}") from None
    for key, names in (
        ("label", [schema.label]),
        ("dense", schema.dense_names),
        ("categorical", schema.categorical_names),
    ):
        for name in names:
            if fault := _name_fault(name):
                raise SchemaError(
                    f"schema file {path}: {key} column {name[:40]!r}: {fault}; rename it in the table, too"
                )
    return schema


def _name_fault(name: str) -> str | None:
    """What keeps a name from being part of the names of tables and files; dots, slashes and blanks do not."""
    if not name:
        return "the name is empty"
    if any(unicodedata.category(character) in {"Cc", "Cs"} for character in name):
        return "the name holds a control character"
    if len(quote(name)) > _MAX_NAME_BYTES:
        return f"the name is too long: {len(quote(name))} bytes when quoted for a file, at most {_MAX_NAME_BYTES}"
    return None


def criteo_schema(*, frequency_threshold: int = 1, num_buckets: int | None = None) -> Schema:
    """The Criteo click logs: 13 integer counts, 26 categorical columns of 32-bit hexadecimal ids.

    Args:
        frequency_threshold: ids seen fewer times share one row (exact vocabularies).
        num_buckets: when given, ids are hashed to this many rows instead.
    """
    encoding: Encoding = "vocabulary" if num_buckets is None else "hash"
    return Schema(
        dense=tuple(DenseColumn(name=f"I{i}") for i in range(1, 14)),
        categorical=tuple(
            CategoricalColumn(
                name=f"C{i}",
                kind="hex",
                encoding=encoding,
                frequency_threshold=frequency_threshold,
                num_buckets=num_buckets,
            )
            for i in range(1, 27)
        ),
    )
