"""Records as people write them, JSON objects by column name: what is wrong with them, and their values by column."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from papilio.data_pipeline.arrow_types import plain_array
from papilio.data_pipeline.errors import PapilioError
from papilio.data_pipeline.raw_values import (
    Faults,
    ValueFaultError,
    integer_of_float,
    is_printed_list,
    printed_list_fault,
    shown,
)
from papilio.data_pipeline.schema import CategoricalColumn, Schema

Record = Mapping[str, Any]
_NUMBER_TYPES = frozenset({int, float, type(None)})
_ID_TYPES = frozenset({int, float, str, type(None)})
_KINDS = {"hex": "up to 8 hexadecimal digits", "string": "a string", "integer": "a whole number"}
_JSON_NAMES = {bool: "a boolean", dict: "an object", list: "a list", str: "a string", float: "a fraction"}


class RequestError(PapilioError, ValueError):
    """A request that cannot be answered; the message names the record, the column and what is allowed."""


def check_records(payload: Any, schema: Schema) -> list[Record]:
    """Return the records of a request `{"records": [{column: value, ...}, ...]}`.

    Raises:
        RequestError: it has another form, or a record has a column that the schema has not.
    """
    if not isinstance(payload, dict) or not isinstance(payload.get("records"), list):
        raise RequestError('the body must be {"records": [{"<column>": <value>, ...}, ...]}; GET / shows an example')
    others = sorted(payload.keys() - {"records"})
    if others:
        raise RequestError(f'{shown(others[0])} is not a key of a request; "records" is the only one')
    records: list[Record] = payload["records"]
    allowed = {schema.label, *schema.dense_names, *schema.categorical_names}
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise RequestError(f"record {index} is {_json_name(record)}, must be an object of values by column name")
        if not allowed.issuperset(record):
            raise RequestError(f"record {index}: {unknown_column(min(record.keys() - allowed), schema)}")
    return records


def unknown_column(name: str, schema: Schema) -> str:
    """Say that the model has no such column, and which one may be meant."""
    names = [*schema.dense_names, *schema.categorical_names]
    # What is much longer is near to none, and comparing it takes long.
    is_comparable = len(name) <= 2 * max(map(len, names), default=0)
    nearest = difflib.get_close_matches(name, names, n=1) if is_comparable else []
    fix = f"did you mean {nearest[0]}?" if nearest else f"columns: {', '.join(names)}"
    return f"there is no column {shown(name)}; {fix}"


def dense_matrix(records: Sequence[Record], names: Sequence[str], faults: Faults) -> NDArray[np.float64]:
    """Return numbers [B, I], NaN where there is none; what is no number is noted in `faults`."""
    values = [record.get(name) for name in names for record in records]
    shape = (len(names), len(records))
    if _NUMBER_TYPES.issuperset(map(type, values)):
        with suppress(OverflowError):  # an integer beyond float64, which is found and named below
            return np.array(values, np.float64).reshape(shape).T
    numbers = np.full(len(values), np.nan)
    for place, value in enumerate(values):
        name, row = names[place // len(records)], place % len(records)
        try:
            if type(value) not in _NUMBER_TYPES:
                raise TypeError
            numbers[place] = np.nan if value is None else float(value)
        except TypeError:
            reason = f"{shown(value)} is {_json_name(value)}, must be a number or null"
            faults.first_of_row.setdefault(row, (name, reason))
        except OverflowError:
            faults.first_of_row.setdefault(row, (name, "too large a number, must fit 64-bit floating point"))
    return numbers.reshape(shape).T


def categorical_array(records: Sequence[Record], column: CategoricalColumn, faults: Faults) -> pa.Array:
    """Return a column's values as Arrow: text or integers, or lists of them; others are noted and left out."""
    if not column.multi_hot:
        values = [record.get(column.name) for record in records]
        return _id_array(values, range(len(values)), column, faults)
    flat: list[Any] = []
    rows: list[int] = []
    lengths = np.zeros(len(records), np.int32)
    for row, record in enumerate(records):
        bag = _bag(record.get(column.name), column, row, faults)
        flat += bag
        rows += [row] * len(bag)
        lengths[row] = len(bag)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), _id_array(flat, rows, column, faults))


def _bag(value: Any, column: CategoricalColumn, row: int, faults: Faults) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, str):  # as in a raw log
        if is_printed_list(value):
            faults.first_of_row.setdefault(row, (column.name, printed_list_fault(value, column.separator)))
            return []
        return value.split(column.separator)
    if isinstance(value, list):
        return value
    reason = f"{shown(value)} is {_json_name(value)}, must be a list, each {_KINDS[column.kind]}"
    faults.first_of_row.setdefault(row, (column.name, reason))
    return []


def _id_array(values: list[Any], rows: Sequence[int], column: CategoricalColumn, faults: Faults) -> pa.Array:
    checked = [_checked(value, rows[i], column, faults) for i, value in enumerate(values)]
    types = set(map(type, checked)) - {type(None)}
    if types <= {int} and column.kind != "string":
        return pa.array(checked, pa.int64())
    as_text = "{:x}" if column.kind == "hex" else "{}"
    texts = [as_text.format(value) if type(value) is int else value for value in checked]
    return plain_array(pa.array(texts, pa.string()))


def _checked(value: Any, row: int, column: CategoricalColumn, faults: Faults) -> Any:
    """Return the value (the integer of a whole float), or None and its fault noted."""
    reason = None
    # What is beyond 64 bits no file can hold either: unsigned ones are ids as text only.
    limit = 2**64 if column.kind == "string" else 2**63
    is_whole = type(value) is float and (value.is_integer() or math.isnan(value))
    if is_whole:
        try:
            return integer_of_float(value)
        except ValueFaultError as error:
            reason = f"{value!r} {error}"
    elif type(value) not in _ID_TYPES or type(value) is float:
        reason = f"{shown(value)} is {_json_name(value)}, must be {_KINDS[column.kind]}, or null"
    elif type(value) is int and not -(2**63) <= value < limit:
        reason = f"{shown(value)} is not a whole number of 64 bits"
    elif type(value) is str and not _is_unicode(value):
        reason = f"{shown(value)} is not UTF-8 text"
    if reason is None:
        return value
    faults.first_of_row.setdefault(row, (column.name, reason))
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        return False
    return True


def _json_name(value: Any) -> str:
    if type(value) is float and math.isinf(value):
        return "infinite"
    return "null" if value is None else _JSON_NAMES.get(type(value), "a number")
