"""The folder of work in progress under an output: each finished piece is one file, there or not, never half there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from papilio.data_pipeline.array_file import ArrayFile
from papilio.data_pipeline.preprocess.bad_rows import PreprocessError
from papilio.data_pipeline.preprocess.vocabulary import VOCABULARY_FOLDER
from papilio.data_pipeline.raw_values import shown
from papilio.data_pipeline.schema import TRANSFORM_VERSION
from papilio.data_pipeline.transforms import binary_array

# Bumped when a staged file changes its form: work begun by another Papilio is refused.
STAGE_VERSION = 2
STAGE_NAME = ".preprocess_in_progress"
_REQUEST_NAME = "request.json"
_MAX_DIFFERENCES = 4


@dataclass(frozen=True)
class Stage:
    """Names of the staged files. Cheap to hand to a worker."""

    folder: str

    def chunk_path(self, chunk: int) -> str:
        """Arrays of one parsed block."""
        return os.path.join(self.folder, f"chunk_{chunk:07d}")

    def ids_path(self, column: int) -> str:
        """Int32 ids of all chunks' keys of one column, one after the other."""
        return os.path.join(self.folder, f"ids_{column:04d}")

    def column_path(self, column: int) -> str:
        """Where each chunk's part of the ids starts, and the column's statistics; its presence means both are there."""
        return os.path.join(self.folder, f"column_{column:04d}")

    def shard_path(self, split: int, number: int) -> str:
        """The manifest's entry of a finished shard."""
        return os.path.join(self.folder, f"shard_{split}_{number:07d}")

    def scratch_path(self, column: int) -> str:
        """Space for a column in work."""
        return os.path.join(self.folder, f"scratch_{column:04d}.{os.getpid()}.tmp")

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def open_stage(output: str, request: dict[str, Any]) -> Stage:
    """Start work in `output`, or continue it when it was started by the same request.

    Raises:
        PreprocessError: other work is in progress there; the message lists the differences.
    """
    stage = Stage(os.path.join(output, STAGE_NAME))
    os.makedirs(stage.folder, exist_ok=True)
    path = os.path.join(stage.folder, _REQUEST_NAME)
    request = request | {"stage_version": STAGE_VERSION, "transform_version": TRANSFORM_VERSION}
    if os.path.exists(path):
        _check_same(_read_request(path, stage.folder), json.loads(json.dumps(request)), output, stage.folder)
    else:
        write_json(path, request)
    for folder in (stage.folder, os.path.join(output, VOCABULARY_FOLDER)):
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            if name.endswith(".tmp"):
                os.remove(os.path.join(folder, name))
    return stage


def _read_request(path: str, folder: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            started = json.load(file)
        if not isinstance(started, dict):
            raise ValueError(f"it holds a JSON {type(started).__name__}")
        return started
    except (OSError, ValueError, RecursionError) as error:
        raise PreprocessError(
            f"work in progress is damaged: {path} ({error}); delete {folder} to start afresh"
        ) from None


def _check_same(started: dict[str, Any], wanted: dict[str, Any], output: str, folder: str) -> None:
    found = [line for key in {**started, **wanted} for line in _differences(started.get(key), wanted.get(key), key)]
    if found:
        more = [f"and {len(found) - _MAX_DIFFERENCES:,} more"] if len(found) > _MAX_DIFFERENCES else []
        raise PreprocessError(
            f"{output} holds unfinished work of another command ({'; '.join(found[:_MAX_DIFFERENCES] + more)}). Give "
            f"the first command again to continue it, choose another --output, or delete {folder} to start afresh"
        )


def _differences(was: Any, now: Any, key: str) -> Iterator[str]:
    """Say what differs between two JSON values; columns are told apart by name."""
    if was == now:
        return
    old, new = _parts(was), _parts(now)
    if not old or not new:
        yield f"{key}: was {shown(was)}, now {shown(now)}"
        return
    for name in {**old, **new}:
        if name in old and name in new:
            yield from _differences(old[name], new[name], f"{key}.{name}")
        else:
            yield f"{key}.{name}: {'left out' if name in old else 'new'} now"
    if list(old) != list(new) and sorted(old) == sorted(new):
        yield f"{key}: now in another order"


def _parts(value: Any) -> dict[str, Any]:
    """Return the parts of an object, or of a list of objects with names, by name; none of other values."""
    if isinstance(value, list) and all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in value):
        return {item["name"]: item for item in value}
    return value if isinstance(value, dict) else {}


def write_json(path: str, value: Any) -> None:
    """Write a JSON file through a temporary name."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(temporary, path)


def read_keys(file: ArrayFile, column: int) -> NDArray[Any] | pa.Array:
    """Read all keys of a column from a chunk file."""
    if f"keys_{column}" in file:
        return file.read(f"keys_{column}")
    offsets: NDArray[np.int64] = file.read(f"key_offsets_{column}")
    return binary_array(offsets, file.read(f"key_bytes_{column}"))
