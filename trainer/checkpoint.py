"""The trained weights of a run: torch.distributed.checkpoint files, and a marker that is written last."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from trainer.ranks import Ranks
from trainer.storage import make_folder, path_manager, read_json, write_json

CHECKPOINT_FORMAT_VERSION = 1
MARKER = "checkpoint.json"


def checkpoint_dir(run_dir: str) -> str:
    """Folder of a run's final weights."""
    return os.path.join(run_dir, "checkpoint")


class CheckpointError(ValueError):
    """Weights that are missing, incomplete, or of another version."""


def save_weights(model: nn.Module, folder: str, ranks: Ranks, facts: dict[str, Any]) -> None:
    """Save all weights of a sharded model; `facts` go into the marker. Collective."""
    if ranks.is_first:
        make_folder(folder)
    dist.barrier(ranks.group)
    dcp.save({"model": model.state_dict()}, storage_writer=dcp.FileSystemWriter(folder))
    if ranks.is_first:
        # Rank 0 commits last: a folder without the marker is not a checkpoint.
        write_json(os.path.join(folder, MARKER), {"format_version": CHECKPOINT_FORMAT_VERSION, **facts})


def load_weights(model: nn.Module, folder: str) -> dict[str, Any]:
    """Load weights into a sharded model, in place, whatever the plan and world size that saved them. Collective.

    Returns:
        the facts of the marker.

    Raises:
        CheckpointError: there is no complete checkpoint, or another version wrote it.
    """
    path = os.path.join(folder, MARKER)
    if not path_manager.exists(path):
        raise CheckpointError(
            f"{folder} holds no complete checkpoint (no {MARKER}): the run did not finish; train again"
        )
    facts: dict[str, Any] = read_json(path)
    if facts.get("format_version") != CHECKPOINT_FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {facts.get('format_version')}; this Papilio reads {CHECKPOINT_FORMAT_VERSION}"
        )
    dcp.load({"model": model.state_dict()}, storage_reader=dcp.FileSystemReader(folder))
    return facts
