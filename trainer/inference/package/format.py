"""What a package is on disk; no pickle in the files that its manifest lists, so that reading them runs nobody's code.

What lies under `formats/` is code, and opened only by who built it or trusts it (formats/trust.py). Needs no torch.

    tables.bin          all tables, one after the other: see below
    dense.safetensors   the dense part: fp32, named as in the checkpoint (without "dense.model.")
    schema.json         columns, transforms and kinds of ids
    vocabulary/*        raw values by id, the data set's own files
    config.json         the config of the run
    sample.json         one raw request, its encoded form, and the expected answer
    report.json, report.html   what the gate measured
    formats/*           compiled forms, made on demand from the files above; not listed in the manifest
    package.json        the manifest, written last: a folder without it is not a package

`tables.bin`, byte by byte. A table begins at its entry's `offset`, a multiple of 64; the bytes between tables are zero.
It is `rows` rows of `row_bytes` bytes with nothing between them, D = `dim` values to a row, little-endian:

    fp32    4 D bytes: the values
    fp16    2 D bytes: the values
    int8    fp16 scale, fp16 bias, then D bytes: one code each
    int4    fp16 scale, fp16 bias, then D/2 bytes: codes 2i (low half) and 2i + 1
    int2    fp16 scale, fp16 bias, then D/4 bytes: codes 4i (lowest two bits) to 4i + 3

A value is scale * code + bias, estimated in fp32. This is the layout in which FBGEMM's CPU lookups read tables with a
row alignment of 1, so the mapped file is their weights as it is.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from papilio.data_pipeline.checksums import file_crc32
from papilio.data_pipeline.inner_path import InnerPath, link_problem

FORMAT_VERSION = 1
MANIFEST = "package.json"
TABLES = "tables.bin"
DENSE = "dense.safetensors"
SCHEMA = "schema.json"
CONFIG = "config.json"
SAMPLE = "sample.json"
REPORT = "report.json"
REPORT_PAGE = "report.html"
VOCABULARIES = "vocabulary"
FORMATS = "formats"
TABLE_ALIGNMENT = 64
Precision = Literal["fp32", "fp16", "int8", "int4", "int2"]
QuantizerName = Literal["minmax", "greedy", "least_squares"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int4", "int2")
PRECISION_BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4, "int2": 2}
SCALE_AND_BIAS_BYTES = 4
_REMEDY = "export it again, or copy it again from where it is whole"


class PackageError(ValueError):
    """A package that is missing, incomplete, damaged, of another version, or that cannot be made."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RowError(_Section):
    """How far a table's rows are from those that were trained.

    Attributes:
        mean_relative: mean over rows of |stored - trained| / |trained|, both Euclidean lengths.
        max_relative: the largest of these.
        rms: root of the mean square of the difference of single values.
        max_absolute: the largest difference of a single value.
        num_coarse_rows: those that span so little that rounding the scale to fp16 may cost more than rounding to codes.
    """

    # Nothing is computed from these: another version may say more.
    model_config = ConfigDict(extra="ignore", frozen=True)

    mean_relative: float = 0.0
    max_relative: float = 0.0
    rms: float = 0.0
    max_absolute: float = 0.0
    num_coarse_rows: int = 0


class TableEntry(_Section):
    """A table, the feature that looks it up, and where it lies in `tables.bin`."""

    name: str
    feature: str
    rows: int = Field(ge=1)
    dim: int = Field(ge=4, multiple_of=4)
    pooling: Literal["sum", "mean"]
    precision: Precision
    quantizer: QuantizerName | None = Field(description="How ranges were chosen; None for fp16 and fp32.")
    offset: int = Field(ge=0, multiple_of=TABLE_ALIGNMENT)
    row_bytes: int = Field(ge=1)
    row_error: RowError

    @property
    def num_bytes(self) -> int:
        """Bytes of the table."""
        return self.rows * self.row_bytes

    @property
    def fp32_bytes(self) -> int:
        """Bytes that it would have in fp32."""
        return self.rows * self.dim * 4


class FileEntry(_Section):
    """A file of the package."""

    num_bytes: int = Field(ge=0)
    crc32: int = Field(ge=0, lt=2**32)


class Source(_Section):
    """Where the model came from."""

    run: str
    checkpoint: str
    step: int
    data: str


class PackageManifest(_Section):
    """Contents of `package.json`.

    Attributes:
        tables: in the order of the schema's features, which is the order of the model's inputs.
        dense_features: names of the dense inputs, in order.
        files: every file but the manifest and `formats/`, by its path in the package.
        versions: of the packages that it was made with.
        certified: what the gate measured, in short (`report.json` has all); None where there was no gate.
    """

    format_version: int = FORMAT_VERSION
    papilio_version: str
    transform_version: int
    made_at: str
    name: str
    architecture: str
    dense_features: tuple[str, ...]
    tables: tuple[TableEntry, ...] = Field(min_length=1)
    source: Source
    versions: dict[str, str]
    files: dict[InnerPath, FileEntry]
    certified: dict[str, float] | None = None

    @property
    def features(self) -> list[str]:
        """Names of the categorical inputs, in order."""
        return [table.feature for table in self.tables]

    @property
    def num_bytes(self) -> int:
        """Size of all files that it lists."""
        return sum(file.num_bytes for file in self.files.values())

    def to_json(self) -> str:
        """Write it with a checksum of its own."""
        content = self.model_dump(mode="json")
        return json.dumps({"crc32": _content_crc32(content), "package": content}, indent=1) + "\n"


_Content = TypeVar("_Content", bound=BaseModel)


@dataclass(frozen=True)
class Package:
    """A package that was opened: its folder and its manifest.

    Attributes:
        checked: names of files whose bytes were held against their checksums, or written, by this process.
    """

    folder: str
    manifest: PackageManifest
    checked: set[str] = field(default_factory=set, compare=False, repr=False)

    def path(self, name: str) -> str:
        """Path of a file of the package, of which nothing was read."""
        return os.path.join(self.folder, name)

    def checked_path(self, name: str, on_bytes: Callable[[int], None] = lambda num_bytes: None) -> str:
        """Path of a file of the package once all its bytes are found to be those that were written.

        Whoever reads a package asks for its files here, so that no byte is used unseen; a file is read once.

        Raises:
            PackageError: it is not listed, is missing, or is damaged.
        """
        if name not in self.checked:
            problem = _file_problem(self.folder, name, self._entry(name), on_bytes)
            if problem is not None:
                raise PackageError(f"{problem}; {_REMEDY}")
            self.checked.add(name)
        return self.path(name)

    def require_sound(self) -> None:
        """Read every byte of every file against its checksum.

        Raises:
            PackageError: a file is missing or damaged.
        """
        for name in self.manifest.files:
            self.checked_path(name)

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the package.

        Raises:
            PackageError: its bytes are not those that were written, or are no JSON.
        """
        entry = self._entry(name)
        with open(self.path(name), "rb") as file:
            raw = file.read()
        if len(raw) != entry.num_bytes or zlib.crc32(raw) != entry.crc32:
            raise PackageError(f"{self.path(name)} is damaged: its size or checksum is not what {MANIFEST} says")
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise PackageError(f"{self.path(name)} is no JSON ({error}); {_REMEDY}") from None

    def read_section(self, name: str, section: type[_Content], *keys: str) -> _Content:
        """Read a JSON file of the package, or what is under `keys` in it, as a model.

        Raises:
            PackageError: its bytes are not those that were written, or say something else.
        """
        content = self.read_json(name)
        try:
            for key in keys:
                content = content[key]
            return section.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, (*keys, *first["loc"])))
            raise PackageError(f"{self.path(name)} does not say what it should ({place}: {first['msg']})") from None
        except (KeyError, TypeError, IndexError):
            raise PackageError(f"{self.path(name)} does not say what it should: it has no {'.'.join(keys)}") from None

    def _entry(self, name: str) -> FileEntry:
        entry = self.manifest.files.get(name)
        if entry is None:
            raise PackageError(f"{self.path(MANIFEST)} lists no {name}, which is needed here; export the run again")
        return entry


def row_bytes(precision: Precision, dim: int) -> int:
    """Bytes of a row of `dim` values."""
    code_bytes = dim * PRECISION_BITS[precision] // 8
    return code_bytes if precision in {"fp32", "fp16"} else SCALE_AND_BIAS_BYTES + code_bytes


def table_offsets(sizes: list[int]) -> list[int]:
    """Where tables of these sizes begin in `tables.bin`, and, as one more, where the last one ends."""
    offsets = [0]
    for num_bytes in sizes:
        offsets.append(math.ceil((offsets[-1]) / TABLE_ALIGNMENT) * TABLE_ALIGNMENT + num_bytes)
    begins = [end - num_bytes for end, num_bytes in zip(offsets[1:], sizes, strict=True)]
    return [*begins, offsets[-1]]


def write_manifest(manifest: PackageManifest, folder: str) -> None:
    """Write the manifest, the last file of a package."""
    path = os.path.join(folder, MANIFEST)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def read_package(folder: str) -> Package:
    """Open a package: read its manifest, and see that every file is there and has its size; their bytes are not read.

    Raises:
        PackageError: it is none, is not complete, is damaged, or was written by another version.
    """
    folder = folder.rstrip("/") or "/"
    package = Package(folder, read_manifest(folder))
    for name, entry in package.manifest.files.items():
        problem = _wrong_size(folder, name, entry)
        if problem is not None:
            raise PackageError(f"{problem}; {_REMEDY}")
    _check_places(package)
    return package


def read_manifest(folder: str) -> PackageManifest:
    """Read the manifest of a package alone, and look at nothing else.

    Raises:
        PackageError: there is none, it is damaged, or it was written by another version.
    """
    path = os.path.join(folder, MANIFEST)
    if not os.path.isfile(path):
        raise PackageError(_no_package(folder))
    problem = link_problem(folder, MANIFEST)
    if problem is not None:
        raise PackageError(problem)
    return _parse_manifest(path)


def verify_package(
    folder: str, on_bytes: Callable[[int], None] = lambda num_bytes: None
) -> Iterator[tuple[str, str | None]]:
    """Read every byte of a package and hold it against its checksum.

    Yields:
        (file, what is wrong with it, or None), the manifest first; damage in `tables.bin` names no table, for a
        checksum is of the whole file.

    Raises:
        PackageError: the folder is no package, its manifest is damaged, or of another version.
    """
    manifest = read_manifest(folder)
    yield MANIFEST, None
    for name, entry in manifest.files.items():
        yield name, _file_problem(folder, name, entry, on_bytes)


def describe_files(folder: str, names: list[str]) -> dict[str, FileEntry]:
    """Return size and checksum of files of a folder."""
    paths = {name: os.path.join(folder, name) for name in names}
    return {name: FileEntry(num_bytes=os.path.getsize(p), crc32=file_crc32(p)) for name, p in paths.items()}


def _no_package(folder: str) -> str:
    if not os.path.isdir(folder):
        what = "is a file, not a package" if os.path.exists(folder) else "does not exist"
    else:
        what = f"is not a package: it has no {MANIFEST}"
    return f"{folder} {what}; `papilio export --run RUN_DIR --output DIR` makes one"


def _parse_manifest(path: str) -> PackageManifest:
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    try:
        tree = json.loads(text)
        content, crc32 = tree["package"], tree["crc32"]
        version = content["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PackageError(f"{path} is damaged: it is not the manifest of a package") from None
    if version != FORMAT_VERSION:
        raise PackageError(
            f"{path} has format version {version}; this Papilio reads {FORMAT_VERSION}: export the run again, or use "
            f"the Papilio that wrote it ({content.get('papilio_version', 'unknown version')})"
        )
    if _content_crc32(content) != crc32 or set(tree) != {"package", "crc32"}:
        raise PackageError(f"{path} is damaged: its checksum is wrong; export it again")
    try:
        # From text, for of Python's lists strict types make no tuples.
        return PackageManifest.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise PackageError(f"{path} is damaged ({'.'.join(map(str, first['loc']))}: {first['msg']})") from None


def _content_crc32(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _wrong_size(folder: str, name: str, entry: FileEntry) -> str | None:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return f"{path} is missing"
    found = os.path.getsize(path)
    if found != entry.num_bytes:
        return f"{path} has {found:,} bytes, not the {entry.num_bytes:,} written"
    return link_problem(folder, name)


def _file_problem(folder: str, name: str, entry: FileEntry, on_bytes: Callable[[int], None]) -> str | None:
    """Read a file; say what is wrong with it, None if nothing."""
    problem, path = _wrong_size(folder, name, entry), os.path.join(folder, name)
    if problem is not None:
        return problem
    try:
        is_sound = file_crc32(path, on_bytes) == entry.crc32
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None if is_sound else f"{path} is damaged: its checksum is not what {MANIFEST} says"


def _check_places(package: Package) -> None:
    """Make sure that no table reaches beyond the file: lookups trust these figures."""
    size = package._entry(TABLES).num_bytes
    for table in package.manifest.tables:
        if table.row_bytes != row_bytes(table.precision, table.dim) or table.offset + table.num_bytes > size:
            raise PackageError(
                f"{package.path(MANIFEST)} places {table.name} at byte {table.offset:,} with {table.row_bytes} bytes a "
                f"row, which does not fit {TABLES} of {size:,} bytes; export it again"
            )
