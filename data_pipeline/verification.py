"""Is a data set whole, as this host reads it? Sizes of all files, and as many checksums as one has time for."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from papilio.data_pipeline.manifest import MANIFEST_NAME, DatasetError, Manifest, ShardInfo, read_manifest
from papilio.data_pipeline.paths import join, path_manager

CHUNK_BYTES = 1 << 24
MAX_PROBLEMS = 8


@dataclass(frozen=True)
class DataCheck:
    """What was found. `problems` are whole sentences; `checked` are the shards whose every byte was read."""

    problems: tuple[str, ...]
    manifest_crc32: int | None
    num_shards: int
    num_bytes: int
    checked: tuple[str, ...]
    checked_bytes: int


def check_data(folder: str, *, first_share: float = 0.0, max_bytes: int | None = None) -> DataCheck:
    """Look at every file of a data set, and read shards against their checksums.

    Args:
        folder: of the data set.
        first_share: where among the shards to begin reading, from 0 to 1, so that hosts begin at different ones.
        max_bytes: read no more than so many bytes (None: all), but at least one shard.
    """
    try:
        manifest = read_manifest(folder)
        with path_manager.open(join(folder, MANIFEST_NAME), "rb") as file:
            crc32 = zlib.crc32(file.read())
    except (DatasetError, OSError) as error:
        return DataCheck((str(error),), None, 0, 0, (), 0)
    problems: list[str] = []
    checked: list[str] = []
    num_checked = 0
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    first = int(first_share * len(shards))
    for shard in [*shards[first:], *shards[:first]]:
        is_read = max_bytes is None or not checked or num_checked + shard.num_bytes <= max_bytes
        problem = _problem_of(join(folder, shard.file), shard, read_all=is_read)
        if problem:
            problems.append(problem)
        elif is_read:
            checked.append(shard.file)
            num_checked += shard.num_bytes
    problems += _missing_vocabularies(folder, manifest)
    total = sum(shard.num_bytes for shard in shards)
    return DataCheck(tuple(_first(problems)), crc32, len(shards), total, tuple(checked), num_checked)


def _problem_of(path: str, shard: ShardInfo, *, read_all: bool) -> str:
    try:
        if not path_manager.exists(path):
            return f"shard {path} is missing; restore it or preprocess the data again"
        num_bytes, crc32 = 0, 0
        with path_manager.open(path, "rb") as file:
            if not read_all:
                num_bytes = file.seek(0, 2)
            else:
                while chunk := file.read(CHUNK_BYTES):
                    num_bytes, crc32 = num_bytes + len(chunk), zlib.crc32(chunk, crc32)
    except OSError as error:
        return f"shard {path} cannot be read ({error.strerror or error}); give this host's user the right to read it"
    if num_bytes != shard.num_bytes:
        return (
            f"shard {path} has {num_bytes:,} bytes, the manifest says {shard.num_bytes:,}; restore it or preprocess "
            "the data again"
        )
    if read_all and crc32 != shard.crc32:
        return f"shard {path} has another checksum than the manifest says; restore it or preprocess the data again"
    return ""


def _missing_vocabularies(folder: str, manifest: Manifest) -> Iterator[str]:
    for stats in manifest.categorical_stats.values():
        if stats.vocabulary_file is not None and not path_manager.exists(join(folder, stats.vocabulary_file)):
            path = join(folder, stats.vocabulary_file)
            yield f"vocabulary {path} is missing; restore it or preprocess the data again"


def _first(problems: list[str]) -> list[str]:
    """Return no more problems than a report bears, and how many more there are."""
    if len(problems) <= MAX_PROBLEMS:
        return problems
    rest = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], f"and {rest:,} more files; restore the data set from where it was made"]
