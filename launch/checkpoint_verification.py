"""Reads every byte of a checkpoint, and says in which file and of which tensors it is damaged."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from data_pipeline.progress import Progress
from launch.checkpoint_text import rate
from sharding.reports.figures import size
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.format import MARKER, Block, CheckpointError

# Rows of a tensor that are told one by one; of more, the first and the last.
MAX_TOLD = 4


@dataclass
class Damage:
    """What is wrong with one file: with the whole of it, if it is, and which blocks of which tensors it concerns."""

    problem: str | None = None
    blocks: dict[str, list[Block]] = field(default_factory=dict)


@dataclass
class Report:
    """What reading a checkpoint came to; damage is by file."""

    name: str
    num_bytes: int
    seconds: float
    damage: Mapping[str, Damage]

    def lines(self) -> list[str]:
        """Return it in lines, one where all is well."""
        verdict = "DAMAGED" if self.damage else "sound"
        lines = [f"{self.name}  {verdict}: {size(self.num_bytes)} read in {rate(self.num_bytes, self.seconds)}"]
        for file, damage in self.damage.items():
            lines.append(f"  {damage.problem or f'{file} holds other bytes than were written'}")
            lines += [f"    {key}, {_rows(blocks)}" for key, blocks in damage.blocks.items()]
        return lines


def verify_checkpoint(folder: CheckpointFolder, name: str) -> Report:
    """Read everything of a complete checkpoint, showing how far it is."""
    begin_s = time.perf_counter()
    damage: dict[str, Damage] = {}
    num_read = 0
    try:
        marker = folder.read_marker(name)
    except CheckpointError as error:
        return Report(name, 0, time.perf_counter() - begin_s, {MARKER: Damage(str(error))})
    with Progress(f"verify {name}", marker.num_bytes, "B", is_shown=True) as progress:
        for what, block, problem in folder.verify(name):
            file = what if block is None else f"{what[: what.find('/') + 1]}{block.file}"
            has_been_read = block is not None or marker.files[what][1] is not None
            num_bytes = block.length if block is not None else marker.files[what][0]
            progress.advance(num_bytes if has_been_read else 0)
            num_read += num_bytes if has_been_read and problem is None else 0
            if problem is None:
                continue
            found = damage.setdefault(file, Damage())
            if block is None:
                found.problem = problem
            else:
                found.blocks.setdefault(what, []).append(block)
    return Report(name, num_read, time.perf_counter() - begin_s, damage)


def _rows(blocks: list[Block]) -> str:
    """Say which rows, and columns where a block has not all of them."""
    told = [
        f"rows {block.offsets[0]:,} to {block.offsets[0] + block.sizes[0]:,}" if block.offsets else "its only value"
        for block in sorted(blocks, key=lambda block: block.offsets)
    ]
    told = list(dict.fromkeys(told))
    return "; ".join(told if len(told) <= MAX_TOLD else [told[0], f"{len(told) - 2} more", told[-1]])
