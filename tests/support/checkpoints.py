"""Checkpoints in tests: saved and loaded around a bare model, and read back whole by NumPy alone."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.format import INDEX, MARKER, Block, Index, Marker, SavedTensor

NAME = "step_{:010}-abcdef"


def save_model(ranks, model, optimizers, folder, step=0):
    """Save a model that has no run around it. Collective."""
    from trainer.checkpoint.model_state import model_state
    from trainer.checkpoint.saver import write_tensors

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
    from trainer.checkpoint.loading import load_newest

    return load_newest(CheckpointFolder(str(folder)), model, optimizers, ranks)


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


def write_checkpoint(folder, tensors, num_copies=1):
    """Write a checkpoint by hand, each tensor one block; tensors of copies by number where there are several."""
    path = Path(folder, NAME.format(7))
    files = {}
    for copy in range(num_copies):
        part = path / f"group_{copy}" if num_copies > 1 else path
        part.mkdir(parents=True)
        entries, raw = {}, b""
        for key, values in (tensors[copy] if num_copies > 1 else tensors).items():
            data = values.tobytes()
            block = Block((0,) * values.ndim, values.shape, "r.bin", len(raw), len(data), zlib.crc32(data))
            entries[key] = SavedTensor(str(values.dtype), values.shape, (block,))
            raw += data
        (part / "r.bin").write_bytes(raw)
        index = Index(entries).to_json()
        (part / INDEX).write_text(index)
        prefix = f"group_{copy}/" if num_copies > 1 else ""
        files[f"{prefix}{INDEX}"] = (len(index), zlib.crc32(index.encode()))
        files[f"{prefix}r.bin"] = (len(raw), None)
    marker = Marker("test", 7, "2026-01-01T00:00:00+00:00", "end", num_copies, 1, files, {}, {}, {}, {})
    (path / MARKER).write_text(marker.to_json())
    return path
