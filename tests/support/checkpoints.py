"""Checkpoints in tests: saved and loaded around a bare model, and read back whole by NumPy alone."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.checkpoint.format import INDEX, MARKER, Block, Index, Marker, SavedTensor

NAME = "step_{:010}-abcdef"


def save_model(ranks, model, optimizers, folder, step=0):
    """Save a model that has no run around it. Collective."""
    from papilio.trainer.checkpoint.model_state import model_state
    from papilio.trainer.checkpoint.saver import write_tensors

    path = Path(folder, NAME.format(step))
    index = write_tensors(model_state(model.module, optimizers), str(path), ranks.group)
    if index is not None:
        (path / INDEX).write_text(index.to_json())
        files = {file: (size, None) for file, size in index.part_sizes().items()}
        files[INDEX] = (len(index.to_json()), zlib.crc32(index.to_json().encode()))
        marker = Marker("test", step, "", "test", 1, ranks.world_size, files, {}, {}, {}, {})
        (path / MARKER).write_text(marker.to_json())
    ranks.agree_on(None)


def load_model(ranks, model, optimizers, folder):
    """Load the newest checkpoint into a model. Collective."""
    from papilio.trainer.checkpoint.loader import load_newest

    return load_newest(CheckpointFolder(str(folder)), model, optimizers, ranks)[1]


def newest(folder) -> Path:
    """Folder of the newest complete checkpoint."""
    return Path(folder, CheckpointFolder(str(folder)).committed_names()[-1])


def saved_tensors(path) -> dict[str, np.ndarray]:
    """All tensors of one checkpoint's folder, put together from its files by the format's description alone."""
    index = json.loads(Path(path, INDEX).read_text())
    tensors = {}
    for key, entry in index["tensors"].items():
        whole = np.full(entry["shape"], np.nan, entry["dtype"])
        for offsets, sizes, number, start, length, _ in entry["blocks"]:
            raw = Path(path, index["files"][number]).read_bytes()[start : start + length]
            place = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
            whole[place] = np.frombuffer(raw, entry["dtype"]).reshape(sizes)
        tensors[key] = whole
    return tensors


def write_checkpoint(folder, tensors, num_copies=1, *, config=None, data=None, rows_per_block=None):
    """Write a checkpoint by hand; tensors of copies by number where there are several.

    Each tensor is one block, or with `rows_per_block` several of so many rows.
    """
    path = Path(folder, NAME.format(7))
    files = {}
    for copy in range(num_copies):
        part = path / f"group_{copy}" if num_copies > 1 else path
        part.mkdir(parents=True)
        with (part / "r.bin").open("wb") as file:
            of_copy = tensors[copy] if num_copies > 1 else tensors
            entries = {key: _write_blocks(file, values, rows_per_block) for key, values in of_copy.items()}
            num_bytes = file.tell()
        index = Index(entries).to_json()
        (part / INDEX).write_text(index)
        prefix = f"group_{copy}/" if num_copies > 1 else ""
        files[f"{prefix}{INDEX}"] = (len(index), zlib.crc32(index.encode()))
        files[f"{prefix}r.bin"] = (num_bytes, None)
    marker = Marker(
        "test", 7, "2026-01-01T00:00:00+00:00", "end", num_copies, 1, files, {}, config or {}, data or {}, {}
    )
    (path / MARKER).write_text(marker.to_json())
    return path


def _write_blocks(file, values, rows_per_block):
    rows = values.shape[0] if values.ndim else 1
    step = rows_per_block if rows_per_block and values.ndim else max(rows, 1)
    blocks = []
    for start in range(0, max(rows, 1), step):
        piece = values[start : start + step] if values.ndim else values
        data = piece.tobytes()
        offsets = (start, *(0,) * (values.ndim - 1)) if values.ndim else ()
        blocks.append(Block(offsets, piece.shape, "r.bin", file.tell(), len(data), zlib.crc32(data)))
        file.write(data)
    return SavedTensor(str(values.dtype), values.shape, tuple(blocks))
