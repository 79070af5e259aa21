"""Plain copies of a checkpoint's tensors that any tool reads: a safetensors file for each table, another for the rest.

The format of safetensors is eight bytes with the length of a JSON header (little-endian), the header, and the values of
the tensors one after the other: it is written here in order, so that a table may be larger than memory. Needs no torch.
"""

from __future__ import annotations

import difflib
import json
import secrets
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from papilio.data_pipeline.paths import join, replace
from papilio.data_pipeline.version import papilio_version
from papilio.sharding.patterns import matching
from papilio.trainer.checkpoint.contents import Contents, NamedTensor
from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.checkpoint.format import ITEM_BYTES, CheckpointError, Marker, copy_folder
from papilio.trainer.checkpoint.whole_tensors import row_bands, stream_tensor
from papilio.trainer.storage.api import free_bytes, list_folder, make_folder, remove_folder, write_file, write_json

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
DENSE_FILE = "dense.safetensors"
DENSE_OPTIMIZER_FILE = "dense_optimizer.safetensors"
SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
}
_HEADER_ALIGNMENT = 8
# What a disk may lack after all, for the manifest and the file system's own records.
_SPARE_BYTES = 1 << 20
_MAX_NAMED = 5


@dataclass(frozen=True)
class ExportFile:
    """One file to be: its path in the output, and the tensors that go into it from a folder of the checkpoint."""

    path: str
    source: str
    tensors: tuple[NamedTensor, ...]

    @property
    def header(self) -> bytes:
        """The file up to its first value."""
        entries: dict[str, Any] = {}
        start = 0
        for named in self.tensors:
            end = start + named.tensor.num_bytes
            dtype = SAFETENSORS_DTYPES[named.tensor.dtype]
            entries[named.name] = {"dtype": dtype, "shape": named.tensor.shape, "data_offsets": [start, end]}
            start = end
        # What safetensors has a place for: text by text.
        starts = {f"{n.name}.column_starts": json.dumps(n.tensor.column_starts) for n in self.tensors if _has_starts(n)}
        text = json.dumps({**({"__metadata__": starts} if starts else {}), **entries}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _HEADER_ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(named.tensor.num_bytes for named in self.tensors)


@dataclass(frozen=True)
class Export:
    """What to export of a checkpoint."""

    name: str
    marker: Marker
    files: tuple[ExportFile, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.num_bytes for file in self.files)

    def write(self, output: str, on_bytes: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Write the files to a folder that is not there yet, or empty; it has its name only once all is written.

        In an object store, which has no folders to rename, the manifest comes last. `on_bytes` hears of each piece.

        Raises:
            CheckpointError: the folder is in use, the disk too small, or a block of the checkpoint damaged.
            StorageError: something could not be read or written.
        """
        _require_empty(output)
        free = free_bytes(output)
        if free is not None and free < self.num_bytes + _SPARE_BYTES:
            raise CheckpointError(
                f"exporting {self.name} needs {self.num_bytes:,} bytes, {output} has {free:,} free; choose an --output "
                "on another disk, or fewer tables with --tables"
            )
        is_remote = "://" in output
        folder = output if is_remote else f"{output.rstrip('/')}.{secrets.token_hex(4)}.tmp"
        try:
            self._write_files(folder, on_bytes)
            if not is_remote:
                replace(folder, output)
        except BaseException:
            with suppress(OSError):
                remove_folder(folder)
            raise

    def _write_files(self, folder: str, on_bytes: Callable[[int], None]) -> None:
        make_folder(folder)
        described = {}
        for file in self.files:
            path = join(folder, file.path)
            make_folder(path.rpartition("/")[0])
            written = _Chunks(file, on_bytes)
            write_file(path, written.make)
            described[file.path] = _describe(file, written.crc32)
        manifest = {
            "format": "papilio dense export",
            "format_version": MANIFEST_VERSION,
            "papilio_version": papilio_version(),
            "checkpoint": self.name,
            "step": self.marker.step,
            "saved_at": self.marker.saved_at,
            "files": described,
            "config": self.marker.config,
            "data": self.marker.data,
            "versions": self.marker.versions,
        }
        write_json(join(folder, MANIFEST), manifest)


def plan_export(
    folder: CheckpointFolder, name: str, *, table_patterns: Sequence[str] = (), with_optimizer: bool = False
) -> Export:
    """Choose what to export of checkpoint `name`, and make sure that all of it is there to be read.

    Args:
        folder: Where it lies.
        name: The checkpoint.
        table_patterns: Names of tables, or patterns with * and ?; all tables without any.
        with_optimizer: The states of the optimizers, too.

    Raises:
        CheckpointError: it is damaged, of another version, or has no table of such a name.
    """
    marker = folder.read_marker(name)
    files: list[ExportFile] = []
    for copy in range(marker.num_copies):
        contents = Contents.of(folder.read_index(name, marker, copy))
        source = copy_folder(join(folder.path, name), copy, marker.num_copies)
        for path, tensors in _choose(contents, table_patterns, with_optimizer=with_optimizer).items():
            prefix = copy_folder("", copy, marker.num_copies).lstrip("/")
            # Wide items first, so that each tensor begins where its items may.
            aligned = sorted(tensors, key=lambda named: -ITEM_BYTES[named.tensor.dtype])
            files.append(ExportFile(join(prefix, path), source, tuple(aligned)))
    for file in files:
        for named in file.tensors:
            for _ in row_bands(named.key, named.tensor):
                pass
    return Export(name, marker, tuple(files))


class _Chunks:
    """The bytes of a file from the beginning, as often as they are asked for; and the checksum of the last time."""

    def __init__(self, file: ExportFile, on_bytes: Callable[[int], None]) -> None:
        self._file = file
        self._on_bytes = on_bytes
        self.crc32 = 0

    def make(self) -> Iterator[bytes | memoryview]:
        self.crc32 = 0
        for chunk in self._chunks():
            self.crc32 = zlib.crc32(chunk, self.crc32)
            yield chunk
            self._on_bytes(len(chunk) if isinstance(chunk, bytes) else chunk.nbytes)

    def _chunks(self) -> Iterator[bytes | memoryview]:
        yield self._file.header
        for named in self._file.tensors:
            yield from stream_tensor(self._file.source, named.key, named.tensor)


def _choose(contents: Contents, patterns: Sequence[str], *, with_optimizer: bool) -> dict[str, tuple[NamedTensor, ...]]:
    """Return the tensors to export by file."""
    files = {}
    for table in _matching(list(contents.tables), patterns):
        tensors = contents.tables[table]
        # A feature may have any name; "/" in it must not make a folder.
        files[f"{quote(table, safe=' +,=@()[]')}.safetensors"] = tensors if with_optimizer else tensors[:1]
    if contents.dense:
        files[DENSE_FILE] = contents.dense
    if with_optimizer and contents.dense_optimizer:
        files[DENSE_OPTIMIZER_FILE] = contents.dense_optimizer
    return files


def _matching(tables: Sequence[str], patterns: Sequence[str]) -> list[str]:
    for pattern in patterns:
        if not matching(tables, [pattern]):
            nearest = difflib.get_close_matches(pattern, tables, _MAX_NAMED, cutoff=0.5) or tables[:_MAX_NAMED]
            more = ", ..." if len(tables) > len(nearest) else ""
            raise CheckpointError(f"--tables {pattern}: no table has such a name; there are {', '.join(nearest)}{more}")
    if not patterns:
        return list(tables)
    return matching(tables, patterns)


def _require_empty(output: str) -> None:
    if list_folder(output):
        raise CheckpointError(f"{output} exists and is not empty; choose another --output, or remove it")


def _describe(file: ExportFile, crc32: int) -> dict[str, Any]:
    return {
        "num_bytes": file.num_bytes,
        "crc32": crc32,
        "tensors": {
            named.name: {
                "key": named.key,
                "dtype": named.tensor.dtype,
                "shape": named.tensor.shape,
                **({"column_starts": named.tensor.column_starts} if _has_starts(named) else {}),
            }
            for named in file.tensors
        },
    }


def _has_starts(named: NamedTensor) -> bool:
    return named.tensor.column_starts is not None
