"""What lies under `formats/` of a package: a folder a format, with `format.json`, written last. Needs no torch.

A format is made from the package's other files on some machine, and says of which package, and what it needs there.
To open one is to run its code: trust.py says whose is opened.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from papilio.data_pipeline.checksums import file_crc32
from papilio.data_pipeline.inner_path import InnerPath, link_problem
from papilio.data_pipeline.version import papilio_version
from papilio.trainer.inference.backends.build_options import FORMAT_NAMES, DenseArithmetic, FormatName
from papilio.trainer.inference.backends.trust import note_build, require_trust
from papilio.trainer.inference.package.format import FORMATS, MANIFEST, FileEntry, Package, PackageError, describe_files
from papilio.trainer.storage.locked_folder import is_left_over, locked_folder

logger = logging.getLogger(__name__)
FORMAT_INFO = "format.json"
# 2: it has a checksum of its own.
FORMAT_INFO_VERSION = 2
_LEFTOVER = re.compile(rf"\.({'|'.join(FORMAT_NAMES)})-[0-9a-f]{{6}}(-old)?")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class BackendFigures(_Section):
    """A backend to compute a package's answers, as it was measured when the choice was made.

    Attributes:
        median_ms: by batch size, as text.
        auc_ratio: its AUC over that of the package with an fp32 dense part; None where nothing is rounded.
        ne_ratio: the same of the normalized entropy.
        max_difference: the largest change of a probability.
        refusal: why it was not to be chosen, None if it was.
    """

    dense: DenseArithmetic
    median_ms: dict[str, float] = Field(default_factory=dict)
    auc_ratio: float | None = Field(None, ge=0)
    ne_ratio: float | None = Field(None, ge=0)
    max_difference: float | None = Field(None, ge=0, le=1)
    refusal: str | None = None


class Choice(_Section):
    """Which backend is used for which batches, and what that rests on.

    Attributes:
        up_to: (largest batch size, backend), ascending; the last one takes larger batches, too.
        num_threads: threads of the process that measured.
        num_samples: held-out samples that accuracy was measured on, 0 where nothing but fp32 was allowed.
        min_auc_ratio: what AUC must be kept of the trained model's, the export's own loss included.
    """

    up_to: tuple[tuple[int, str], ...] = Field(min_length=1)
    ways: dict[str, BackendFigures]
    num_threads: int = Field(ge=1)
    num_samples: int = Field(ge=0)
    min_auc_ratio: float = Field(ge=0, le=1)
    held_out: str | None

    @model_validator(mode="after")
    def _check_sizes(self) -> Choice:
        sizes = [size for size, _ in self.up_to]
        if sizes != sorted(set(sizes)) or sizes[0] < 1:
            raise ValueError(f"batch sizes {sizes} must ascend from 1 or more")
        unknown = sorted(
            {backend for _, backend in self.up_to} - {n for n, found in self.ways.items() if not found.refusal}
        )
        if unknown:
            raise ValueError(f"backend {unknown[0]} is chosen, and is not among those that were allowed")
        return self


class FormatInfo(_Section):
    """Contents of `format.json`.

    Attributes:
        package_crc32: of the `package.json` that it was made from.
        needs: versions of libraries that must be the same where it runs.
        instruction_sets: of the processor that it was compiled for; a processor that lacks one cannot run it.
        files: all other files of the folder.
        choice: of format "fastest", and of no other.
    """

    info_version: int = FORMAT_INFO_VERSION
    name: FormatName
    package_crc32: int = Field(ge=0, lt=2**32)
    papilio_version: str
    made_at: str
    needs: dict[str, str] = Field(default_factory=dict)
    instruction_sets: tuple[str, ...] = ()
    files: dict[InnerPath, FileEntry]
    choice: Choice | None = None

    @model_validator(mode="after")
    def _check_choice(self) -> FormatInfo:
        if (self.choice is not None) != (self.name == "fastest"):
            raise ValueError(f"format {self.name} has {'a' if self.choice else 'no'} choice of backends")
        return self

    def to_json(self) -> str:
        """Write it with a checksum of its own."""
        content = self.model_dump(mode="json")
        return json.dumps({"crc32": _content_crc32(content), **content}, indent=1) + "\n"


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
    _sweep(parent)
    target, mark = os.path.join(parent, name), secrets.token_hex(3)
    with (
        locked_folder(os.path.join(parent, f".{name}-{mark}")) as folder,
        locked_folder(os.path.join(parent, f".{name}-{mark}-old")) as old,
    ):
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
            file.write(info.to_json())
        problem = note_build(folder, target)
        if os.path.isdir(target):
            os.rename(target, os.path.join(old, name))
        os.rename(folder, target)
    if problem is not None:
        logger.warning("%s", problem)
    return info


def _sweep(parent: str) -> None:
    """Remove what killed builds left behind."""
    for name in os.listdir(parent):
        path = os.path.join(parent, name)
        if _LEFTOVER.fullmatch(name) and is_left_over(path):
            logger.info("removing %s, which a build that was cut off left behind", path)
            shutil.rmtree(path, ignore_errors=True)


def read_format(
    package: Package,
    name: FormatName,
    *,
    trusts_formats: bool,
    require_fit: Callable[[Package, FormatInfo], None] = lambda package, info: None,
) -> FormatInfo:
    """Read what a format says of itself, and make sure that it is whole, of this very package, and trusted.

    Args:
        package: whose format.
        name: which.
        trusts_formats: whether it is opened whoever built it.
        require_fit: raises where it does not fit this machine.

    Raises:
        PackageError: it was not built, is damaged, was built from other bytes, or was built by others and is not
            trusted.
    """
    folder = format_path(package, name)
    remedy = f"`papilio package build {package.folder} --format {name}`"
    if not os.path.isfile(os.path.join(folder, FORMAT_INFO)):
        raise PackageError(f"{package.folder} has no format {name}; {remedy} makes it")
    info = _parse(folder, f"{remedy} makes it anew")
    problem = _origin_problem(package, name, info)
    if problem is not None:
        raise PackageError(f"{folder} {problem}; {remedy} makes one that is")
    require_fit(package, info)
    for file, problem in _problems(folder, info):
        if problem is not None:
            raise PackageError(f"{os.path.join(folder, file)}: {problem}; {remedy} makes it anew")
    if not trusts_formats:
        require_trust(folder, f"format {name} of {package.folder}", remedy)
    return info


def verify_formats(package: Package) -> Iterator[tuple[str, str | None]]:
    """Read every byte of the formats that were built and hold it against its checksum.

    Yields:
        (file, what is wrong with it, or None).
    """
    parent = package.path(FORMATS)
    names = sorted(os.listdir(parent)) if os.path.isdir(parent) else []
    # A name that begins with a dot is of a build under backend, or of one that was killed; nobody opens it.
    for name in [name for name in names if not name.startswith(".")]:
        folder, base = os.path.join(parent, name), f"{FORMATS}/{name}"
        if name not in FORMAT_NAMES:
            yield base, f"is no format; there are {', '.join(FORMAT_NAMES)}: remove it"
        elif not os.path.isfile(os.path.join(folder, FORMAT_INFO)):
            yield f"{base}/{FORMAT_INFO}", "is missing"
        else:
            yield from ((f"{base}/{file}", problem) for file, problem in _verify(package, name, folder))


def _verify(package: Package, name: str, folder: str) -> Iterator[tuple[str, str | None]]:
    try:
        info = _parse(folder, "building it again fixes that")
    except PackageError as error:
        yield FORMAT_INFO, str(error).removeprefix(f"{os.path.join(folder, FORMAT_INFO)} ")
        return
    yield FORMAT_INFO, _origin_problem(package, name, info)
    yield from _problems(folder, info)


def _origin_problem(package: Package, name: str, info: FormatInfo) -> str | None:
    if info.name != name:
        return f"is format {info.name} under another name"
    if info.package_crc32 != file_crc32(package.path(MANIFEST)):
        return f"was built from another {MANIFEST} than that of {package.folder}"
    return None


def _parse(folder: str, remedy: str) -> FormatInfo:
    path = os.path.join(folder, FORMAT_INFO)
    problem = link_problem(folder, FORMAT_INFO)
    if problem is not None:
        raise PackageError(problem)
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            content = json.load(file)
        version = content["info_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PackageError(f"{path} is damaged; {remedy}") from None
    if version != FORMAT_INFO_VERSION:
        raise PackageError(f"{path} has version {version}; this Papilio reads {FORMAT_INFO_VERSION}: {remedy}")
    crc32 = content.pop("crc32", None)
    if crc32 != _content_crc32(content):
        raise PackageError(f"{path} is damaged: its checksum is wrong; {remedy}")
    try:
        # From text, for of Python's lists strict types make no tuples.
        return FormatInfo.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        raise PackageError(
            f"{path} is damaged ({'.'.join(map(str, first['loc']))}: {first['msg']}); {remedy}"
        ) from None


def _content_crc32(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _problems(folder: str, info: FormatInfo) -> Iterator[tuple[str, str | None]]:
    """Read every file of a format; yield its name and what is wrong with it, None if nothing."""
    for name, entry in info.files.items():
        yield name, _file_problem(folder, name, entry)
    for name in _files_under(folder):
        if name not in info.files and name != FORMAT_INFO:
            yield name, f"is not listed in {FORMAT_INFO}"


def _file_problem(folder: str, name: str, entry: FileEntry) -> str | None:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return "is missing"
    if os.path.getsize(path) != entry.num_bytes:
        return f"has {os.path.getsize(path):,} bytes, not the {entry.num_bytes:,} written"
    problem = link_problem(folder, name)
    if problem is not None:
        return problem
    try:
        is_sound = file_crc32(path) == entry.crc32
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if is_sound else f"is damaged: its checksum is not what {FORMAT_INFO} says"


def _files_under(folder: str) -> list[str]:
    return sorted(
        os.path.relpath(os.path.join(parent, file), folder) for parent, _, files in os.walk(folder) for file in files
    )
