"""`papilio checkpoint`: look at, check, thin out and export the checkpoints of a run, on any machine, without torch."""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from dataclasses import asdict
from typing import Any

from papilio.data_pipeline.paths import join
from papilio.data_pipeline.progress import Progress
from papilio.data_pipeline.terminal import table_columns
from papilio.launch.jobs import checkpoint_text as text
from papilio.launch.jobs.checkpoint_verification import verify_checkpoint
from papilio.launch.usage import UsageError
from papilio.sharding.plan_file import PlanFileError, plan_from_json
from papilio.sharding.reports.figures import size
from papilio.trainer.checkpoint.contents import Contents
from papilio.trainer.checkpoint.folder import CheckpointFolder, Committed, best_of
from papilio.trainer.checkpoint.format import MARKER, PLAN, CheckpointError, DamagedError, Index, Marker, copy_folder
from papilio.trainer.checkpoint.selection import NoRunError, complete_ones, find_checkpoint, find_folder
from papilio.trainer.checkpoint.tensor_export import plan_export
from papilio.trainer.run.lock import LOCK, holder_of
from papilio.trainer.storage.api import StorageError, exists

INCOMPLETE, DAMAGED, OTHER_VERSION = "incomplete", "damaged", "other version"
EXPLANATIONS = {
    INCOMPLETE: "being saved now, or cut off; the next start of the job removes what was cut off",
    DAMAGED: "the marker cannot be read; `papilio checkpoint verify` says why",
    OTHER_VERSION: "another Papilio wrote it in a format that this one does not read",
}


def run_checkpoint(namespace: argparse.Namespace) -> int:
    """Do what `papilio checkpoint ACTION RUN` asks for."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    actions = {"list": _list, "show": _show, "verify": _verify, "prune": _prune, "export-dense": _export}
    try:
        folder = find_folder(namespace.run)
    except NoRunError as error:
        raise UsageError(str(error)) from None
    return actions[namespace.action](folder, namespace)


def _list(folder: CheckpointFolder, namespace: argparse.Namespace) -> int:
    """Print the checkpoints as a table, or as JSON."""
    committed, others = _survey(folder)
    if namespace.json:
        print(json.dumps(_list_json(committed, others), indent=1))
        return 0
    print(text.describe_total(committed, others, folder.path))
    if committed or others:
        print("\n" + "\n".join(text.format_list(committed, others, text.utc_now(), _columns())))
    for status in dict.fromkeys(others.values()):
        print(f"\n{status}: {EXPLANATIONS[status]}")
    return 0


def _survey(folder: CheckpointFolder) -> tuple[list[Committed], dict[str, str]]:
    """Return the complete checkpoints, oldest first, and what the others are, by name."""
    complete = set(folder.committed_names())
    committed, others = [], {}
    for name in folder.names():
        try:
            if name in complete:
                committed.append(Committed(name, folder.read_marker(name)))
            else:
                others[name] = INCOMPLETE
        except DamagedError:
            others[name] = DAMAGED
        except CheckpointError:
            others[name] = OTHER_VERSION
        except StorageError:
            if exists(join(folder.path, name, MARKER)):  # else training removed it just now
                raise
    return committed, others


def _list_json(committed: list[Committed], others: dict[str, str]) -> list[dict[str, Any]]:
    best = best_of(committed)
    entries: list[dict[str, Any]] = [{"name": name, "status": status} for name, status in others.items()]
    for found in committed:
        marker = found.marker
        entry = {"name": found.name, "status": "complete", "step": marker.step, "saved_at": marker.saved_at}
        entry |= {"saved_for": marker.saved_for, "world_size": marker.world_size, "num_bytes": marker.num_bytes}
        entry["validation_auc"] = None if math.isnan(found.validation_auc) else found.validation_auc
        entries.append(entry | {"is_newest": found is committed[-1], "is_best": found is best})
    return sorted(entries, key=lambda entry: str(entry["name"]))


def _show(folder: CheckpointFolder, namespace: argparse.Namespace) -> int:
    """Print everything that is known of one checkpoint without reading its tensors."""
    name = find_checkpoint(folder, namespace.name)
    marker = folder.read_marker(name)
    indices = [folder.read_index(name, marker, copy) for copy in range(marker.num_copies)]
    if namespace.json:
        print(json.dumps({"name": name, **asdict(marker), "tensors": _tensors_json(indices)}, indent=1))
        return 0
    now, columns = text.utc_now(), _columns()
    sections = [
        text.describe(Committed(name, marker), _roles(folder, name), now, columns)
        + _plan(folder, name, marker, columns),
        text.describe_history(marker, columns),
        text.describe_tensors(Contents.of(indices[0]), columns, show_all=namespace.all),
    ]
    print(text.joined(sections))
    return 0


def _plan(folder: CheckpointFolder, name: str, marker: Marker, columns: int) -> list[str]:
    """Return the plan it was saved under; one that cannot be read hides nothing else."""
    file = join(copy_folder("", 0, marker.num_copies).lstrip("/"), PLAN)
    try:
        plan = plan_from_json(folder.read_listed(name, marker, file).decode(), join(folder.path, name, file))
    except CheckpointError as error:
        return text.paragraph("plan", str(error), columns)
    except PlanFileError:  # its checksum is right
        return text.paragraph("plan", "in the format of another Papilio; plan.json in its folder has it", columns)
    return text.describe_plan(plan, columns)


def _tensors_json(indices: list[Index]) -> list[dict[str, Any]]:
    """Return the tensors by key, for each copy of the model."""
    return [
        {
            key: {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "num_bytes": tensor.num_bytes,
                "num_blocks": len(tensor.blocks),
                "column_starts": tensor.column_starts,
            }
            for key, tensor in index.tensors.items()
        }
        for index in indices
    ]


def _roles(folder: CheckpointFolder, name: str) -> str:
    committed, _ = _survey(folder)
    best = best_of(committed)
    roles = ["newest"] if committed and committed[-1].name == name else []
    roles += ["best"] if best is not None and best.name == name else []
    return f"({' and '.join(roles)} of {len(committed)})" if roles else f"(one of {len(committed)})"


def _verify(folder: CheckpointFolder, namespace: argparse.Namespace) -> int:
    """Read every byte; print what is damaged."""
    if namespace.all and namespace.names:
        raise UsageError("--all and names exclude each other")
    words = namespace.names or ["latest"]
    names = folder.committed_names() if namespace.all else [find_checkpoint(folder, word) for word in words]
    if not names:
        complete_ones(folder)
    num_damaged = 0
    for name in names:
        report = verify_checkpoint(folder, name)
        print("\n".join(report.lines(_columns())), flush=True)
        num_damaged += bool(report.damage)
    if num_damaged:
        print(f"{num_damaged} of {len(names)} damaged; training resumes from the newest that is sound")
    return int(num_damaged > 0)


def _prune(folder: CheckpointFolder, namespace: argparse.Namespace) -> int:
    """Remove old checkpoints, or only say which."""
    committed = complete_ones(folder)
    if namespace.keep_last < 1:
        raise UsageError(
            f"--keep-last {namespace.keep_last} would leave no complete checkpoint to resume from; keep 1 or more"
        )
    surplus = folder.surplus(namespace.keep_last, keep_best=namespace.keep_best)
    going = {found.name for found in surplus}
    if surplus:
        _require_sound(folder, [found for found in committed if found.name not in going])
    holder = None if namespace.dry_run else holder_of(folder.path)
    if isinstance(holder, str):
        raise CheckpointError(
            f"{holder}, so nobody knows whether a job is in {folder.path}; nothing was removed. See that none trains "
            "there, remove what lies there, and prune again"
        )
    if holder is not None:
        raise CheckpointError(
            f"{folder.path} is in use by {holder}, which keeps what checkpoint.keep_last says; nothing was removed. "
            f"Prune after its end; if it is gone, remove {join(folder.path, LOCK)}"
        )
    now = text.utc_now()
    verbs = ("would go", "would stay") if namespace.dry_run else ("removed", "kept")
    cells = [[verbs[found.name not in going], *text.describe_removal(found, now)] for found in committed]
    lines = text.align(cells, [True, True, False, False, True])
    for found, line in zip(committed, lines, strict=True):
        if found.name in going and not namespace.dry_run:
            folder.remove(found.name)
        print(line)
    freed = size(sum(found.marker.num_bytes for found in surplus))
    print(f"{freed} would be freed; nothing was removed" if namespace.dry_run else f"{freed} freed")
    for name, status in _survey(folder)[1].items():
        fix = "the next start of the job removes it" if status == INCOMPLETE else "remove it by hand if nobody needs it"
        print(f"{join(folder.path, name)} is {status} and was left; {fix}")
    return 0


def _require_sound(folder: CheckpointFolder, kept: list[Committed]) -> None:
    """Make sure that one of those that stay has all its files, before others go.

    Raises:
        CheckpointError: none has; names the first file that is wrong.
    """
    problems = [problem for problem in (folder.first_problem(found) for found in reversed(kept)) if problem is not None]
    if len(problems) == len(kept):
        raise CheckpointError(f"nothing was removed, since none of what would stay is sound: {problems[0]}")


def _export(folder: CheckpointFolder, namespace: argparse.Namespace) -> int:
    """Write plain tensors."""
    name = find_checkpoint(folder, namespace.name)
    export = plan_export(folder, name, table_patterns=namespace.tables, with_optimizer=namespace.optimizer)
    begin_s = time.perf_counter()
    with Progress(f"export {name}", export.num_bytes, "B", is_shown=True, is_kept=False) as progress:
        export.write(namespace.output, progress.advance)
    seconds = time.perf_counter() - begin_s
    speed = text.rate(export.num_bytes, seconds)
    print(f"{namespace.output}: {len(export.files)} files, {size(export.num_bytes)} of {name} in {speed}")
    return 0


def _columns() -> int:
    return table_columns()
