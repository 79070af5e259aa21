"""Which Arrow types a column may have, by what it is for: one table for Parquet files and for requests.

`plain_array` brings every accepted type to one of a few: large binary (text), integers, floating point, decimals,
booleans or null; a bag's lists are opened by `open_lists`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from papilio.data_pipeline.schema import Role

_WANTED: dict[Role, str] = {
    "label": "numbers or booleans, each 0 or 1",
    "dense": "numbers",
    "id": "text or integers",
    "bag": "lists of text or integers",
}
_MAX_TYPE_LENGTH = 80
_TEXT_TESTS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    # Text in files of systems that do not mark it as such; what is not UTF-8 is found value by value.
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
)
_LIST_TESTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
    pa.types.is_fixed_size_list,
)


def type_fault(data_type: pa.DataType, name: str, role: Role) -> str | None:
    """Say what is wrong with a column's type and what to do about it; None if it may have that type."""
    inner = _decoded(data_type)
    if is_list(inner):
        element = _decoded(inner.value_type)
        if role == "bag" and _is_scalar(element, role):
            return None
        fix = "set multi_hot = true for it in the schema" if role == "id" and _is_scalar(element, role) else ""
    elif _is_scalar(inner, role) and (role != "bag" or is_text(inner) or pa.types.is_null(inner)):
        return None
    else:
        fix = "make each value a list, or set multi_hot = false in the schema" if _is_scalar(inner, role) else ""
    shown = str(data_type)
    shown = shown if len(shown) <= _MAX_TYPE_LENGTH else shown[: _MAX_TYPE_LENGTH - 3] + "..."
    return f"column {name} is of type {shown}, must hold {_WANTED[role]}; {fix or _conversion(inner, role)}"


def _conversion(data_type: pa.DataType, role: Role) -> str:
    """What a column of a type that no role takes becomes, if it is to be used."""
    if pa.types.is_boolean(data_type):
        return "write its values as 0 and 1"
    if role in ("label", "dense"):
        return "convert it to numbers (a time, for example, to seconds)"
    return "convert it to text or integers, or take it from the schema"


def _is_scalar(data_type: pa.DataType, role: Role) -> bool:
    kinds = pa.types
    if kinds.is_boolean(data_type):
        return role == "label"
    tests = (kinds.is_integer, kinds.is_floating, kinds.is_decimal, kinds.is_null, *_TEXT_TESTS)
    return any(test(data_type) for test in tests)


def is_text(data_type: pa.DataType) -> bool:
    """Whether values are text, in whatever layout."""
    return any(test(data_type) for test in _TEXT_TESTS)


def is_list(data_type: pa.DataType) -> bool:
    """Whether values are lists, in whatever layout."""
    return any(test(data_type) for test in _LIST_TESTS)


def plain_array(array: pa.Array) -> pa.Array:
    """Undo dictionaries and run-ends, and turn text of any layout into large binary; other values stay."""
    if pa.types.is_run_end_encoded(array.type):
        array = pc.run_end_decode(array)
    if pa.types.is_dictionary(array.type):
        # `take` has no kernel for views, so the dictionary becomes plain first.
        array = plain_array(array.dictionary).take(array.indices)
    return array.cast(pa.large_binary()) if is_text(array.type) else array


def plain_column(column: pa.ChunkedArray) -> pa.Array:
    """Return a table's column as one plain array."""
    chunks = [plain_array(chunk) for chunk in column.chunks]
    if len(chunks) == 1:
        return chunks[0]
    return pa.concat_arrays(chunks) if chunks else plain_array(pa.array([], column.type))


def open_lists(array: pa.Array) -> tuple[pa.Array, NDArray[np.int64]]:
    """Return the plain values of all lists, one after the other, and how many each has; none where it is null."""
    if pa.types.is_null(array.type):
        return pa.nulls(0), np.zeros(len(array), np.int64)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return plain_array(array.flatten()), lengths


def _decoded(data_type: pa.DataType) -> pa.DataType:
    while pa.types.is_dictionary(data_type) or pa.types.is_run_end_encoded(data_type):
        data_type = data_type.value_type
    return data_type
