"""How much a request may ask for, whatever it looks like on the wire. A body of 16 KiB can unpack to gigabytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from papilio.data_pipeline.schema import Schema
from papilio.trainer.inference.encoding.json_records import Record, RequestError
from papilio.trainer.inference.serving.serve_options import ServeOptions

# A body may become so many times larger in memory. Columns that compress this well hold next to nothing: 4,096 records
# of Criteo's 39 columns are 1.3 MB, and the JSON of small records grows eight times as Python objects.
MAX_EXPANSION = 16
# What a value counts at least, whatever its type: with it a body may hold one for each 4 of the bytes that it may have.
BYTES_PER_VALUE = 64
# All requests that wait may hold so many times what one of them may.
_MAX_WAITING_REQUESTS = 16


class TooLargeError(RequestError):
    """A request that asks for more than is allowed; the message says how much it was and what to do."""


@dataclass(frozen=True)
class RequestLimits:
    """Of the content of one request.

    Attributes:
        max_records: in a request.
        max_bag_ids: ids of one record in one multi-hot column.
        max_bytes: in memory, when nothing is compressed or shared any more; each value counts 64 or more.
        max_waiting_bytes: of all requests of a process that wait to be scored.
    """

    max_records: int
    max_bag_ids: int
    max_bytes: int
    max_waiting_bytes: int

    @staticmethod
    def of(options: ServeOptions) -> RequestLimits:
        """Derive them from a server's options."""
        max_bytes = MAX_EXPANSION * options.max_body_bytes
        return RequestLimits(
            options.max_queue, options.max_bag_ids, max_bytes, _MAX_WAITING_REQUESTS * max(max_bytes, 1 << 24)
        )

    def check_records(self, count: int) -> None:
        """Refuse a request of too many records.

        Raises:
            TooLargeError: it has.
        """
        if count > self.max_records:
            raise TooLargeError(f"{count:,} records, a request may have {self.max_records:,}; send fewer in a request")

    def check_bytes(self, num_bytes: int) -> None:
        """Refuse content that would take too much memory.

        Raises:
            TooLargeError: it would.
        """
        if num_bytes > self.max_bytes:
            raise TooLargeError(
                f"the body would take {num_bytes:,} bytes in memory ({BYTES_PER_VALUE} a value at least), at most "
                f"{self.max_bytes:,} are allowed ({MAX_EXPANSION} times --max-body-bytes); send fewer records"
            )

    def check_bag(self, column: str, num_ids: int, row: int | None = None) -> None:
        """Refuse a bag of too many ids.

        Raises:
            TooLargeError: it has.
        """
        if num_ids > self.max_bag_ids:
            place = f"column {column}" if row is None else f"record {row}, column {column}"
            raise TooLargeError(
                f"{place}: a bag of {num_ids:,} ids, at most {self.max_bag_ids:,} are allowed (--max-bag-ids)"
            )

    def check_json_bags(self, records: Sequence[Record], schema: Schema, num_bytes: int) -> None:
        """Refuse JSON records with a bag of too many ids; `num_bytes` is the size of their text.

        Raises:
            TooLargeError: there is one.
        """
        if num_bytes < 2 * self.max_bag_ids:  # an id takes a digit and a comma: none can be too long
            return
        total = 0
        for column in schema.categorical:
            if column.multi_hot:
                for row, record in enumerate(records):
                    num_ids = _num_ids(record.get(column.name), column.separator)
                    self.check_bag(column.name, num_ids, row)
                    total += num_ids
        self.check_bytes(total * BYTES_PER_VALUE)


def _num_ids(value: Any, separator: str) -> int:
    if isinstance(value, str):
        return value.count(separator) + 1
    return len(value) if isinstance(value, list) else 0
