"""What lies under `formats/` of a package: a folder a format, with `format.json`, written last. Needs no torch.

A format is made from the package's other files on some machine, and says of which package, and what it needs there.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipeline.version import papilio_version
from trainer.inference.formats.build_options import FORMAT_NAMES, DenseArithmetic, FormatName
from trainer.inference.package import FORMATS, MANIFEST, FileEntry, Package, PackageError, describe_files, file_crc32

FORMAT_INFO = "format.json"
FORMAT_INFO_VERSION = 1
# Files up to this size are read at every opening, which takes milliseconds; of larger ones only the size is looked at.
_CHECKED_BYTES = 64 << 20


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WayFigures(_Section):
    """A way to compute a package's answers, as it was measured when the choice was made.

    Attributes:
        median_ms: by batch size, as text.
        auc_ratio: its AUC over that of the package with an fp32 dense part; None where nothing is rounded.
        ne_ratio: the same of the normalized entropy.
        max_difference: the largest change of a probability.
        refusal: why it was not to be chosen, None if it was.
    """

    dense: DenseArithmetic
    median_ms: dict[str, float] = Field(default_factory=dict)
    auc_ratio: float | None = None
    ne_ratio: float | None = None
    max_difference: float | None = None
    refusal: str | None = None


class Choice(_Section):
    """Which way is used for which batches, and what that rests on.

    Attributes:
        up_to: (largest batch size, way), ascending; the last one takes larger batches, too.
        num_threads: threads of the process that measured.
        num_samples: held-out samples that accuracy was measured on, 0 where nothing but fp32 was allowed.
        min_auc_ratio: what AUC must be kept of the trained model's, the export's own loss included.
    """

    up_to: tuple[tuple[int, str], ...] = Field(min_length=1)
    ways: dict[str, WayFigures]
    num_threads: int
    num_samples: int
    min_auc_ratio: float
    held_out: str | None


class FormatInfo(_Section):
    """Contents of `format.json`.

    Attributes:
        package_crc32: of the `package.json` that it was made from.
        needs: versions of libraries that must be the same where it runs.
        instruction_sets: of the processor that it was compiled for; a processor that lacks one cannot run it.
        files: all other files of the folder.
        choice: of format "fastest".
    """

    info_version: int = FORMAT_INFO_VERSION
    name: FormatName
    package_crc32: int
    papilio_version: str
    made_at: str
    needs: dict[str, str] = Field(default_factory=dict)
    instruction_sets: tuple[str, ...] = ()
    files: dict[str, FileEntry]
    choice: Choice | None = None


@dataclass(frozen=True)
class Made:
    """What building a format found out beside its files; the fields are those of `FormatInfo`."""

    needs: Mapping[str, str]
    instruction_sets: tuple[str, ...] = ()
    choice: Choice | None = None


def format_path(package: Package, name: FormatName, *parts: str) -> str:
    """Path of a file of a format, or of its folder."""
    return os.path.join(package.folder, FORMATS, name, *parts)


def has_format(package: Package, name: FormatName) -> bool:
    """Say whether a format was built, whatever state it is in."""
    return os.path.isfile(format_path(package, name, FORMAT_INFO))


def write_format(package: Package, name: FormatName, build: Callable[[str], Made]) -> FormatInfo:
    """Let `build` fill a new folder and give it the format's name once it is whole; an older one is replaced."""
    parent = os.path.join(package.folder, FORMATS)
    os.makedirs(parent, exist_ok=True)
    target, mark = os.path.join(parent, name), secrets.token_hex(3)
    folder, old = os.path.join(parent, f".{name}-{mark}"), os.path.join(parent, f".{name}-{mark}-old")
    os.mkdir(folder)
    try:
        made = build(folder)
        info = FormatInfo(
            name=name,
            package_crc32=file_crc32(package.path(MANIFEST)),
            papilio_version=papilio_version(),
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
            needs=dict(made.needs),
            instruction_sets=made.instruction_sets,
            files=describe_files(folder, _files_under(folder)),
            choice=made.choice,
        )
        with open(os.path.join(folder, FORMAT_INFO), "w", encoding="utf-8") as file:
            file.write(info.model_dump_json(indent=1) + "\n")
        if os.path.isdir(target):
            os.rename(target, old)
        os.rename(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return info


def read_format(package: Package, name: FormatName) -> FormatInfo:
    """Read what a format says of itself, and make sure that it is whole and of this very package.

    Raises:
        PackageError: it was not built, is damaged, or was built from other bytes.
    """
    path = format_path(package, name, FORMAT_INFO)
    mend = f"`papilio package build {package.folder} --format {name}`"
    if not os.path.isfile(path):
        raise PackageError(f"{package.folder} has no format {name}; {mend} makes it")
    info = _parse(path, mend)
    if info.package_crc32 != file_crc32(package.path(MANIFEST)):
        raise PackageError(
            f"{os.path.dirname(path)} was built from another {MANIFEST} than that of {package.folder}; {mend} again"
        )
    for file, problem in _problems(os.path.dirname(path), info, _CHECKED_BYTES):
        if problem is not None:
            raise PackageError(f"{file}: {problem}; {mend} makes it anew")
    return info


def verify_formats(package: Package) -> Iterator[tuple[str, str | None]]:
    """Read every byte of the formats that were built and hold it against its checksum.

    Yields:
        (file, what is wrong with it, or None).
    """
    for name in FORMAT_NAMES:
        path = format_path(package, name, FORMAT_INFO)
        if not os.path.isfile(path):
            continue
        folder, base = os.path.dirname(path), f"{FORMATS}/{name}"
        try:
            info = _parse(path, "building it")
        except PackageError as error:
            yield f"{base}/{FORMAT_INFO}", str(error)
            continue
        is_of_this = info.package_crc32 == file_crc32(package.path(MANIFEST))
        yield f"{base}/{FORMAT_INFO}", None if is_of_this else f"was built from another {MANIFEST}"
        yield from (
            (f"{base}/{os.path.relpath(file, folder)}", problem) for file, problem in _problems(folder, info, None)
        )


def _parse(path: str, mend: str) -> FormatInfo:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            content = json.load(file)
        version = content["info_version"]
    except (ValueError, KeyError, TypeError):
        raise PackageError(f"{path} is damaged; {mend} makes it anew") from None
    if version != FORMAT_INFO_VERSION:
        raise PackageError(f"{path} has version {version}; this Papilio reads {FORMAT_INFO_VERSION}: {mend} again")
    try:
        return FormatInfo.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise PackageError(
            f"{path} is damaged ({'.'.join(map(str, first['loc']))}: {first['msg']}); {mend} makes it anew"
        ) from None


def _problems(folder: str, info: FormatInfo, largest_read: int | None) -> Iterator[tuple[str, str | None]]:
    for name, entry in info.files.items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            yield path, "is missing"
        elif os.path.getsize(path) != entry.num_bytes:
            yield path, f"has {os.path.getsize(path):,} bytes, not the {entry.num_bytes:,} written"
        elif (largest_read is None or entry.num_bytes <= largest_read) and file_crc32(path) != entry.crc32:
            yield path, f"is damaged: its checksum is not what {FORMAT_INFO} says"
        else:
            yield path, None


def _files_under(folder: str) -> list[str]:
    return sorted(
        os.path.relpath(os.path.join(parent, file), folder) for parent, _, files in os.walk(folder) for file in files
    )
