"""Arrow IPC streams of clients to tables, whose size is known before any of it is unpacked.

What makes a small body large: compressed buffers, dictionaries and views (many rows that show one long value), and
counts of rows that need no bytes at all (nulls, runs). The messages' metadata gives the first and the last: it is read
here, field by field, as Arrow's format lays it out (format/Message.fbs); pyarrow has no reader of it. By the time that
pyarrow unpacks a body, each of its counts and sizes has been held against the limits.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from papilio.trainer.inference.encoding.json_records import RequestError
from papilio.trainer.inference.serving.request_limits import BYTES_PER_VALUE, RequestLimits, TooLargeError

# Batches and dictionaries of one request. Each costs some 30 us, and 1 MiB has room for 5,000 that are empty.
_MAX_MESSAGES = 1024
_NOT_A_STREAM = "the body is not an Arrow IPC stream"
# Places of fields in the tables of Message.fbs.
_HEADER_TYPE, _HEADER = 0x1, 0x2
_DICTIONARY_DATA = 1
_LENGTH, _NODES, _BUFFERS, _COMPRESSION = range(4)
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_MAX_CACHED_BYTES = 1 << 16
_NOT_COMPRESSED = -1
_PREFIX_BYTES = 8

Pairs = NDArray[np.int64]


def read_arrow(body: bytes, limits: RequestLimits, separators: Mapping[str, str]) -> tuple[pa.Table, int]:
    """Read an Arrow IPC stream; nothing in it is trusted before it is checked.

    Args:
        body: the stream.
        limits: of a request.
        separators: by multi-hot column, what is between its ids where they are sent as text.

    Returns:
        The table, without dictionaries and views, and the bytes that its values take at most.

    Raises:
        RequestError: it is none, or is damaged.
        TooLargeError: it would become larger than is allowed.
    """
    try:
        num_bytes, schema = _expanded_bytes(body, limits)
        types = (_types_of if len(schema) < _MAX_CACHED_BYTES else _types_of.__wrapped__)(schema, frozenset(separators))
        with pa.ipc.open_stream(body) as reader:
            table = reader.read_all()
        if types:
            table.validate()
            # First, for a full validation reads a value as often as it is shown.
            limits.check_bytes(
                num_bytes + sum(_shown_by_views(chunk) for number in types for chunk in table.column(number).chunks)
            )
        table.validate(full=True)
        return _without_sharing(table, types, num_bytes, limits, separators)
    except RequestError:
        raise
    except (pa.ArrowException, OSError, ValueError, IndexError, struct.error, TypeError) as error:
        raise RequestError(f"{_NOT_A_STREAM}: {error}") from None


def _expanded_bytes(body: bytes, limits: RequestLimits) -> tuple[int, bytes]:
    """Return the bytes of a stream's buffers once they are unpacked, and its schema's message.

    All counts in it are held against the limits.
    """
    num_records = num_bytes = num_batches = 0
    schema = b""
    for message in pa.ipc.MessageReader.open_stream(body):
        metadata = bytes(message.metadata)
        if not schema:
            schema = message.serialize().to_pybytes()
        if (batch := _batch_of(metadata)) is None:
            continue
        kind, place = batch
        num_batches += 1
        if num_batches > _MAX_MESSAGES:
            raise TooLargeError(f"more than {_MAX_MESSAGES:,} record batches and dictionaries; send larger ones")
        counts = _pairs(metadata, place, _NODES)[:, 0]
        if kind == _RECORD_BATCH:
            num_records += _length(metadata, place)
            limits.check_records(num_records)
        if counts.min(initial=0) < 0:
            raise RequestError(f"{_NOT_A_STREAM}: it has a column of a negative length")
        # Added up as floating point, which no sum of large counts overflows.
        num_values = counts.sum(dtype=np.float64)
        num_bytes += max(int(num_values) * BYTES_PER_VALUE, _buffer_bytes(metadata, place, message))
        limits.check_bytes(num_bytes)
    return num_bytes, schema


def _buffer_bytes(metadata: bytes, place: int, message: pa.Message) -> int:
    buffers = _pairs(metadata, place, _BUFFERS)
    offsets, lengths = buffers[:, 0], buffers[:, 1]
    size = message.body.size if message.body is not None else 0
    if len(buffers) and (offsets.min() < 0 or lengths.min() < 0 or (offsets.astype(float) + lengths).max() > size):
        raise RequestError(f"{_NOT_A_STREAM}: it has a buffer outside its body")
    total = int(lengths.sum())  # all lengths are below the body's size, but buffers may overlap
    if _field(metadata, place, _COMPRESSION) is None:
        return total
    for offset, length in buffers.tolist():
        if length < _PREFIX_BYTES:
            continue
        (unpacked,) = struct.unpack_from("<q", message.body, offset)
        if unpacked < _NOT_COMPRESSED:
            raise RequestError(f"{_NOT_A_STREAM}: it has a buffer of a negative length")
        total += 0 if unpacked == _NOT_COMPRESSED else unpacked
    return total


def _batch_of(metadata: bytes) -> tuple[int, int] | None:
    """Return a message's kind and where its RecordBatch table begins; None if it has none."""
    (root,) = struct.unpack_from("<I", metadata, 0)
    kind_place, header = _field(metadata, root, _HEADER_TYPE), _field(metadata, root, _HEADER)
    if kind_place is None or header is None:
        return None
    kind = metadata[kind_place]
    place = _target(metadata, header)
    if kind == _DICTIONARY_BATCH:
        data = _field(metadata, place, _DICTIONARY_DATA)
        return None if data is None else (kind, _target(metadata, data))
    return (kind, place) if kind == _RECORD_BATCH else None


def _length(metadata: bytes, batch: int) -> int:
    place = _field(metadata, batch, _LENGTH)
    length = 0 if place is None else int(struct.unpack_from("<q", metadata, place)[0])
    if length < 0:
        raise RequestError(f"{_NOT_A_STREAM}: it has a record batch of a negative length")
    return length


def _pairs(metadata: bytes, table: int, field: int) -> Pairs:
    """Return a vector of structs of two 64-bit numbers: [structs, 2]."""
    place = _field(metadata, table, field)
    if place is None:
        return np.empty((0, 2), np.int64)
    vector = _target(metadata, place)
    (count,) = struct.unpack_from("<I", metadata, vector)
    return np.frombuffer(metadata, "<i8", 2 * count, vector + 4).reshape(-1, 2)


def _field(metadata: bytes, table: int, number: int) -> int | None:
    """Return where a field of a flatbuffers table is, None if it has its default."""
    (back,) = struct.unpack_from("<i", metadata, table)
    fields = table - back
    (size,) = struct.unpack_from("<H", metadata, fields)
    at = 4 + 2 * number
    if at + 2 > size:
        return None
    (offset,) = struct.unpack_from("<H", metadata, fields + at)
    return table + int(offset) if offset else None


def _target(metadata: bytes, place: int) -> int:
    return place + int(struct.unpack_from("<I", metadata, place)[0])


@lru_cache(maxsize=32)
def _types_of(schema: bytes, multi_hot: frozenset[str]) -> dict[int, pa.DataType]:
    """Return the plain types of columns that are not plain or may hold bags.

    In the others, which are most, each value is in the body itself. The requests of a client have one schema, and
    looking at its columns takes longer than all other checks.
    """
    return {
        number: _plain_type(field)
        for number, field in enumerate(pa.ipc.read_schema(pa.py_buffer(schema)))
        if field.type.id not in _PLAIN or field.name in multi_hot
    }


def _without_sharing(
    table: pa.Table,
    types: Mapping[int, pa.DataType],
    num_bytes: int,
    limits: RequestLimits,
    separators: Mapping[str, str],
) -> tuple[pa.Table, int]:
    """Return a table in which no value stands for several, once it is known how large that is."""
    for number, plain in types.items():
        field = table.field(number)
        if plain != field.type:
            column = table.column(number)
            num_bytes += sum(_num_bytes(chunk) for chunk in column.chunks)
            limits.check_bytes(num_bytes)
            table = table.set_column(number, field.name, column.cast(plain))
        if num_bytes > 2 * limits.max_bag_ids:  # below, no bag can be too long: an id takes two bytes at least
            _check_bags(table.column(number), field.name, separators.get(field.name), limits)
    return table, num_bytes


def _check_bags(column: pa.ChunkedArray, name: str, separator: str | None, limits: RequestLimits) -> None:
    if _is_list(column.type):
        limits.check_bag(name, pc.max(pc.list_value_length(column)).as_py() or 0)
    elif separator is not None and column.type.id in _VARIABLE:
        most = pc.max(pc.count_substring(column, separator)).as_py()
        limits.check_bag(name, (most or 0) + 1)


def _num_bytes(array: pa.Array) -> int:
    """Return the bytes of an array's values when each stands for itself."""
    kind = array.type
    if _is_list(kind):
        return _num_bytes(array.values)
    if not pa.types.is_dictionary(kind):
        return int(_lengths(array).sum())
    indices = array.indices.drop_null().to_numpy(zero_copy_only=False)
    return BYTES_PER_VALUE * len(array) + int(_lengths(array.dictionary)[indices].sum())


def _shown_by_views(array: pa.Array) -> int:
    """Return the bytes of text that views of an array show; each may show the same."""
    if _is_list(array.type):
        return _shown_by_views(array.values)
    if pa.types.is_dictionary(array.type):
        return _shown_by_views(array.dictionary)
    return int(_lengths(array).sum()) if array.type.id in _TEXT_OF_VIEWS else 0


def _lengths(array: pa.Array) -> NDArray[np.float64]:
    """Return the bytes of each value of text, 0 for others; as floating point, since no sum of these overflows."""
    if array.type.id in _TEXT_OF_VIEWS:
        # A view is 16 bytes, of which the first four are its length (pyarrow's binary_length knows no views).
        views = np.frombuffer(array.buffers()[1] or b"", "<i4").reshape(-1, 4)
        return views[array.offset : array.offset + len(array), 0].astype(np.float64).clip(0)
    if array.type.id not in _VARIABLE:
        return np.zeros(len(array))
    lengths: NDArray[np.float64] = pc.binary_length(array).cast(pa.float64()).fill_null(0).to_numpy()
    return lengths


def _plain_type(field: pa.Field) -> pa.DataType:
    """Return the type of the same values, each standing for itself.

    Raises:
        RequestError: they have none that a model could use, while they may stand for any number of values.
    """
    kind = field.type
    if kind.id in _PLAIN:
        return kind
    is_list = _is_list(kind)
    element = kind.value_type if is_list else kind
    is_dictionary = pa.types.is_dictionary(element)
    shown = element.value_type if is_dictionary else element
    plain = _TEXT_OF_VIEWS.get(shown.id, shown)
    # Of list views, too: pyarrow 26 turns those with nulls into lists of other values.
    is_no_value = (
        pa.types.is_nested(plain)
        or pa.types.is_temporal(plain)
        or (pa.types.is_fixed_size_binary(plain) and not pa.types.is_decimal(plain))
        or isinstance(plain, pa.BaseExtensionType)
    )
    if is_no_value or (is_dictionary and plain.id not in _PLAIN):
        raise RequestError(f"column {field.name} is of type {kind}, must hold text or numbers, or lists of these")
    if not is_list or plain == element:
        return kind if is_list else plain
    return pa.large_list(plain) if pa.types.is_large_list(kind) else pa.list_(plain)


def _is_list(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _ids(types: Iterator[pa.DataType]) -> frozenset[int]:
    return frozenset(kind.id for kind in types)


_VARIABLE = _ids(kind() for kind in (pa.string, pa.large_string, pa.binary, pa.large_binary))
_TEXT_OF_VIEWS = {pa.string_view().id: pa.large_string(), pa.binary_view().id: pa.large_binary()}
_PLAIN = _ids(
    kind()
    for kind in (
        *(pa.null, pa.bool_, pa.int8, pa.int16, pa.int32, pa.int64, pa.uint8, pa.uint16, pa.uint32, pa.uint64),
        *(pa.float16, pa.float32, pa.float64, pa.string, pa.large_string, pa.binary, pa.large_binary),
    )
)
