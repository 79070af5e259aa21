"""A Parquet file of scores, written some rows at a time; it has its name only once it is whole."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from papilio.trainer.storage.local_files import make_local_folder, sync_folder

# Fewer make many small row groups, which readers are slow at; more would need more memory.
GROUP_ROWS = 1 << 18


class ScoreFile:
    """Gathers rows into row groups."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer, self._schema = writer, schema
        self._held: list[Any] = []
        self._num_held = 0

    def write(self, columns: dict[str, Any]) -> None:
        """Add rows, given by column."""
        arrays = [pa.array(columns[field.name], field.type) for field in self._schema]
        self._held.append(pa.Table.from_arrays(arrays, schema=self._schema))
        self._num_held += len(arrays[0])
        if self._num_held >= GROUP_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is held, as a row group."""
        if self._num_held:
            self._writer.write_table(pa.concat_tables(self._held), row_group_size=self._num_held)
        self._held, self._num_held = [], 0


@contextmanager
def new_score_file(path: str, columns: dict[str, pa.DataType]) -> Iterator[ScoreFile]:
    """Make a file of these columns; an error on the way leaves nothing, and an older file of that name as it was."""
    folder = os.path.dirname(os.path.abspath(path))
    make_local_folder(folder)
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    schema = pa.schema(list(columns.items()))
    try:
        with open(temporary, "xb") as sink:
            with pq.ParquetWriter(sink, schema) as writer:
                file = ScoreFile(writer, schema)
                yield file
                file.flush()
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(temporary, path)
        sync_folder(folder)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
