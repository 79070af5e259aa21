"""May this job resume from that checkpoint? What may change between the runs of a job, and what may not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from papilio.trainer.checkpoint.format import CheckpointError

# What a run may resume with another value of; sections, or single keys. Anything else would make another model, or
# train on samples twice and on others not at all.
SAFE = (
    "train",
    "schedule",
    "sharding",
    "output",
    "checkpoint",
    "optimizer.sparse.learning_rate",
    "optimizer.sparse.eps",
    "optimizer.sparse.weight_decay",
    "optimizer.dense.learning_rate",
    "optimizer.dense.eps",
    "optimizer.dense.weight_decay",
    "data.path",
    "data.verify_checksums",
    "data.prefetch_batches",
    "data.shape",
)
# Of the identity of the data set: where it lies may change, what is in it may not.
DATA_KEYS = ("transform_version", "schema", "num_embeddings", "splits", "vocabularies")

# Of the config, what hosts of one job may have otherwise: where each reads its data (what it reads is compared), how
# far ahead, and the run folder, which the first rank's config names.
OWN_AFFAIRS = ("data.path", "data.prefetch_batches", "data.verify_checksums", "output.run_dir", "output.runs_dir")


def shared_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that all hosts of a job must have alike, as JSON by dotted key."""
    return {key: json.dumps(value) for key, value in leaves(config) if key not in OWN_AFFAIRS}


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return (old, new) by dotted key, of two trees of plain values; a key that is missing counts as None."""
    before, after = dict(leaves(old)), dict(leaves(new))
    keys = sorted({*before, *after})
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def safe_changes(
    old_config: Mapping[str, Any],
    new_config: Mapping[str, Any],
    old_data: Mapping[str, Any],
    new_data: Mapping[str, Any],
    where: str,
) -> dict[str, tuple[Any, Any]]:
    """Return what changed between two runs of a job, if it may.

    Raises:
        CheckpointError: lists what may not change; `where` names the run.
    """
    changed = changes(old_config, new_config)
    refused = {key: pair for key, pair in changed.items() if not _is_safe(key)}
    data = [key for key in DATA_KEYS if old_data.get(key) != new_data.get(key)]
    if refused or data:
        lines = [f"  {key} = {_shown(new)}, was {_shown(old)}" for key, (old, new) in refused.items()]
        lines += [f"  the data set's {key}: {_first_difference(old_data.get(key), new_data.get(key))}" for key in data]
        raise CheckpointError(
            f"{where} cannot resume with another\n" + "\n".join(lines) + "\nPut back the old, or choose another "
            "output.run_dir to start anew (batch size, learning rates, number of steps, sharding and ranks may change)"
        )
    return changed


def _is_safe(key: str) -> bool:
    return any(key == safe or key.startswith(f"{safe}.") for safe in SAFE)


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a tree by dotted key."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, list(tree) if isinstance(tree, tuple) else tree


def _first_difference(old: Any, new: Any) -> str:
    differing = changes({"": old}, {"": new}) if not isinstance(old, Mapping) else changes(old, new or {})
    # The number of rows says more than the checksums of the files.
    key, (before, after) = min(differing.items(), key=lambda change: (not change[0].endswith("num_rows"), change[0]))
    more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
    return f"{key + ' = ' if key else ''}{_shown(after)}, was {_shown(before)}{more}"


def _shown(value: Any) -> str:
    return cut(repr(value))


def cut(text: str) -> str:
    """Return a text no longer than a line bears."""
    return text if len(text) <= 60 else text[:57] + "..."
