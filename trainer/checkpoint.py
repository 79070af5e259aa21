"""The trained weights of a run: torch.distributed.checkpoint files, and a marker that is written last."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from trainer.ranks import Ranks
from trainer.sharded_model import ShardedModel
from trainer.storage import make_folder, path_manager, read_json, write_json

CHECKPOINT_FORMAT_VERSION = 1
MARKER = "checkpoint.json"


def checkpoint_dir(run_dir: str) -> str:
    """Folder of a run's final weights."""
    return os.path.join(run_dir, "checkpoint")


class CheckpointError(ValueError):
    """Weights that are missing, incomplete, or of another version."""


def save_weights(model: ShardedModel, folder: str, ranks: Ranks, facts: dict[str, Any]) -> None:
    """Save all weights of a sharded model; `facts` go into the marker. Collective.

    Groups with independent tables save a folder each, the dense part in every one; of groups whose tables are averaged
    the first saves for all. One save over all ranks would take some tables from one group and some from another.
    """
    copies = model.num_copies
    if ranks.is_first:
        for copy in range(copies):
            make_folder(_copy_dir(folder, copy, copies))
    dist.barrier(ranks.group)
    if model.group_index < copies:
        writer = dcp.FileSystemWriter(_copy_dir(folder, model.group_index, copies))
        dcp.save({"model": model.module.state_dict()}, storage_writer=writer, process_group=model.shard_group)
    dist.barrier(ranks.group)
    if ranks.is_first:
        # Rank 0 commits last: a folder without the marker is not a checkpoint.
        marker = {"format_version": CHECKPOINT_FORMAT_VERSION, "num_copies": copies, **facts}
        write_json(os.path.join(folder, MARKER), marker)


def load_weights(model: ShardedModel, folder: str) -> dict[str, Any]:
    """Load weights into a sharded model, in place, whatever the plan and world size that saved them. Collective.

    Returns:
        the facts of the marker.

    Raises:
        CheckpointError: there is no complete checkpoint, another version wrote it, or it holds independent tables of
            another number of groups.
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
    copies = facts.get("num_copies", 1)
    if copies > 1 and copies != model.num_copies:
        raise CheckpointError(
            f"{folder} holds the independent tables of {copies} groups, this job has {model.num_copies}; set "
            f"sharding.replicas.num_groups = {copies} and independent_tables = true, on a multiple of {copies} ranks"
        )
    reader = dcp.FileSystemReader(_copy_dir(folder, model.group_index, copies))
    dcp.load({"model": model.module.state_dict()}, storage_reader=reader, process_group=model.shard_group)
    return facts


def _copy_dir(folder: str, copy: int, copies: int) -> str:
    return folder if copies == 1 else os.path.join(folder, f"group_{copy}")
