"""What a checkpoint is on disk; no pickle in it, so that reading one runs nobody's code.

    step_0000001000-3fa9c2/
      rank_00000_part_00000.bin     raw little-endian values, block after block, nothing between them
      rank_00001_part_00000.bin
      index.json                    where each block of each tensor is, and its CRC-32
      plan.json                     the sharding plan it was saved under
      checkpoint.json               the marker, written last: a folder without it is not a checkpoint

Keys are the same whatever the sharding type: `tables.<table>.weight` and `tables.<table>.<state>` [rows, dim],
`tables.<table>.row_wise.<state>` [rows, column blocks], for each block of columns that is trained apart has a value of
its own for a row, `dense.<parameter>`, `dense_optimizer.<parameter>.<state>`.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from papilio.data_pipeline.inner_path import inner_path_problem
from papilio.trainer.storage.api import to_json

FORMAT_VERSION = 2
MARKER = "checkpoint.json"
INDEX = "index.json"
PLAN = "plan.json"
ROW_WISE_KEY = re.compile(r"tables\.(.+)\.row_wise\.[a-z_]+")
STEP_FOLDER = re.compile(r"step_(\d{10})-[0-9a-f]{6}")
# A reader with another plan reads whole blocks, which are checked whole: small enough to waste little, large enough for
# a disk to be fast.
BLOCK_BYTES = 16 << 20
# A file is what is sent again when sending fails, and what an object store holds in memory meanwhile.
PART_BYTES = 256 << 20
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4}


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete, damaged, of another version, or of another job."""


class LostTableError(CheckpointError):
    """What is trained is not what was planned, so that no checkpoint would be whole. Raised on every rank."""

    @classmethod
    def of(cls, lost: Sequence[str]) -> LostTableError:
        """Return the error for what is missing: tables by name, or tensors with what is missing of them."""
        return cls(
            f"the model as it was sharded lacks {', '.join(lost)}, which the plan has: no checkpoint of it would be "
            "whole, so none is written. Plan anew (leave out sharding.plan, or make it again with `papilio plan`)"
        )


class DamagedError(CheckpointError):
    """A committed checkpoint whose bytes are not those that were written; an older one may be whole."""


@dataclass(frozen=True)
class Block:
    """A rectangle of a tensor: `length` bytes of part file `file` from `start` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int
    crc32: int


@dataclass(frozen=True)
class SavedTensor:
    """A tensor and its blocks.

    Attributes:
        column_starts: of a state with one value a row, the first column of each block of columns, by place.
    """

    dtype: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    column_starts: tuple[int, ...] | None = None

    @property
    def num_bytes(self) -> int:
        """Size of its values."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def coverage_problem(self) -> str | None:
        """Say which values no block holds, or more than one; None where the blocks are the whole tensor."""
        return coverage_problem(self.shape, [(block.offsets, block.sizes) for block in self.blocks])


@dataclass(frozen=True)
class Index:
    """All tensors of one copy of the model, by key."""

    tensors: dict[str, SavedTensor]

    def part_sizes(self) -> dict[str, int]:
        """Return the bytes of every part file."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            for block in tensor.blocks:
                sizes[block.file] = max(sizes.get(block.file, 0), block.start + block.length)
        return sizes

    def to_json(self) -> str:
        """Write it, file names as numbers."""
        files = sorted({block.file for tensor in self.tensors.values() for block in tensor.blocks})
        numbers = {file: number for number, file in enumerate(files)}
        tensors = {
            key: {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                **({} if tensor.column_starts is None else {"column_starts": tensor.column_starts}),
                "blocks": [
                    (block.offsets, block.sizes, numbers[block.file], block.start, block.length, block.crc32)
                    for block in tensor.blocks
                ],
            }
            for key, tensor in sorted(self.tensors.items())
        }
        return json.dumps({"files": files, "tensors": tensors}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Index:
        """Read what `to_json` wrote."""
        tree = json.loads(text)
        files = tree["files"]
        return cls(
            {
                key: SavedTensor(
                    dtype=entry["dtype"],
                    shape=tuple(entry["shape"]),
                    blocks=tuple(
                        Block(tuple(offsets), tuple(sizes), files[number], start, length, crc32)
                        for offsets, sizes, number, start, length, crc32 in entry["blocks"]
                    ),
                    column_starts=tuple(entry["column_starts"]) if "column_starts" in entry else None,
                )
                for key, entry in tree["tensors"].items()
            }
        )


@dataclass(frozen=True)
class Marker:
    """What the marker says.

    Attributes:
        step: steps that were trained.
        saved_at: UTC, ISO 8601.
        saved_for: why: "every_steps", "every_minutes", "best", "preemption" or "end".
        num_copies: copies of the model that differ (groups with independent tables), each in a folder `group_<i>`.
        world_size: ranks that saved it.
        files: by path in the folder: (size in bytes, CRC-32); None for part files, whose blocks have their own.
        progress: what the loop resumes from (see `papilio.trainer.run_state`).
        config: the resolved config.
        data: identity of the data set (see `papilio.trainer.run.folder`).
        versions: of the packages that made it.
    """

    papilio_version: str
    step: int
    saved_at: str
    saved_for: str
    num_copies: int
    world_size: int
    files: dict[str, tuple[int, int | None]]
    progress: dict[str, Any]
    config: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    format_version: int = FORMAT_VERSION

    @property
    def num_bytes(self) -> int:
        """Size of all files but the marker."""
        return sum(size for size, _ in self.files.values())

    def to_json(self) -> str:
        """Write it with a checksum of its own."""
        content = json.dumps(json.loads(to_json(self.__dict__)), sort_keys=True)
        return json.dumps({"crc32": zlib.crc32(content.encode()), "checkpoint": json.loads(content)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, path: str) -> Marker:
        """Read what `to_json` wrote.

        Raises:
            DamagedError: it is damaged.
            CheckpointError: it is of another version.
        """
        try:
            tree = json.loads(text)
            content, crc32 = dict(tree["checkpoint"]), tree["crc32"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DamagedError(f"{path} is damaged: it is not a checkpoint's marker") from None
        if zlib.crc32(json.dumps(content, sort_keys=True).encode()) != crc32:
            raise DamagedError(f"{path} is damaged: its checksum is wrong")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path} has format version {version}; this Papilio reads {FORMAT_VERSION}")
        try:
            files = {name: tuple(entry) for name, entry in content["files"].items()}
            marker = cls(**{**content, "files": files, "progress": _with_nan(content["progress"])})
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise DamagedError(f"{path} is damaged: {error}") from None
        problem = next(filter(None, map(inner_path_problem, marker.files)), None)
        if problem is not None:
            raise DamagedError(f"{path} is damaged: {problem}")
        return marker


def coverage_problem(
    shape: tuple[int, ...], rectangles: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]
) -> str | None:
    """Say where rectangles (offsets, sizes) leave a tensor out, or overlap; None where they are the whole, each once.

    Those of the same columns must follow each other by rows, as every sharding type leaves them.
    """
    rows: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, int]]] = {}
    num_found = 0
    for offsets, sizes in rectangles:
        num_found += math.prod(sizes)
        if shape:
            rows.setdefault((offsets[1:], sizes[1:]), []).append((offsets[0], offsets[0] + sizes[0]))
    if num_found != math.prod(shape):
        return f"{num_found:,} of {math.prod(shape):,} values"
    for (starts, widths), spans in rows.items():
        problem = _gap(sorted(spans), shape[0], "row")
        if problem is not None:
            return f"{problem} of columns {starts[0]:,} to {starts[0] + widths[0] - 1:,}" if starts else problem
    if len(shape) == 2:
        return _gap(sorted((starts[0], starts[0] + widths[0]) for starts, widths in rows), shape[1], "column")
    return None


def _gap(spans: list[tuple[int, int]], end: int, what: str) -> str | None:
    """Say where sorted spans [start, stop) leave something of 0 to `end` out, or overlap."""
    stop = 0
    for start, next_stop in [*spans, (end, end)]:
        if start != stop:
            how = "missing" if start > stop else "there twice"
            return f"{what}s {min(start, stop):,} to {max(start, stop) - 1:,} are {how}"
        stop = next_stop
    return None


def _with_nan(progress: dict[str, Any]) -> dict[str, Any]:
    """Return progress with the metrics that JSON had to write as null: an AUC of one class."""
    if "validations" not in progress:
        return progress
    validations = [
        (step, {name: math.nan if value is None else value for name, value in values.items()})
        for step, values in progress["validations"]
    ]
    return {**progress, "validations": validations}


def copy_folder(folder: str, copy: int, num_copies: int) -> str:
    """Folder of one copy of the model: the checkpoint's own where there is only one."""
    return folder if num_copies == 1 else f"{folder}/group_{copy}"
