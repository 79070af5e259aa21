"""Reads every byte of a checkpoint, and says in which file and of which tensors it is damaged."""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from papilio.data_pipeline.progress import Progress
from papilio.launch.jobs.checkpoint_text import rate
from papilio.sharding.reports.figures import size
from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.checkpoint.format import MARKER, Block, CheckpointError

# Tensors of a damaged file that are told one by one, and blocks of a tensor; of more, what they belong to.
MAX_TENSORS = 8
MAX_PLACES = 4
GROUP = re.compile(r"group_\d+/")
TABLE_KEY = re.compile(r"(?:group_\d+/)?tables\.(.+?)(?:\.row_wise)?\.[a-z_0-9]+")
OTHER_PARTS = {"dense": "the dense part", "dense_optimizer": "the dense optimizer"}


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

    def lines(self, columns: int) -> list[str]:
        """Return it in lines, one where all is well."""
        verdict = "DAMAGED" if self.damage else "sound"
        lines = [f"{self.name}  {verdict}: {size(self.num_bytes)} read in {rate(self.num_bytes, self.seconds)}"]
        for file, damage in self.damage.items():
            lines.append(f"  {damage.problem or f'{file} holds other bytes than were written'}")
            if len(damage.blocks) <= MAX_TENSORS:
                lines += [f"    {key} {_places(blocks)}".rstrip() for key, blocks in damage.blocks.items()]
            else:
                told = f"concerns {len(damage.blocks)} tensors: {', '.join(_owners(damage.blocks))}"
                lines += textwrap.wrap(told, columns, initial_indent="    ", subsequent_indent="      ")
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
    with Progress(f"verify {name}", marker.num_bytes, "B", is_shown=True, is_kept=False) as progress:
        for what, block, problem in folder.verify(name):
            file = what if block is None else _group(what) + block.file
            num_bytes, crc32 = (block.length, block.crc32) if block is not None else marker.files.get(what, (0, None))
            has_been_read = crc32 is not None
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


def _group(what: str) -> str:
    """Return the folder of a tensor's copy of the model, where there are several."""
    match = GROUP.match(what)
    return match[0] if match else ""


def _places(blocks: list[Block]) -> str:
    """Say which rows and columns as NumPy does: [0:512, 0:8]."""
    places = [
        f"[{', '.join(f'{first}:{first + number}' for first, number in zip(block.offsets, block.sizes, strict=True))}]"
        for block in sorted(blocks, key=lambda block: block.offsets)
        if block.offsets
    ]
    return " ".join(places if len(places) <= MAX_PLACES else [places[0], f"... {len(places) - 2} more ...", places[-1]])


def _owners(keys: Iterable[str]) -> list[str]:
    """Return the tables of tensors, and the parts of the model that are not tables."""
    found = [(key, TABLE_KEY.fullmatch(key)) for key in keys]
    owners = [match[1] if match else OTHER_PARTS[key.rpartition("/")[2].partition(".")[0]] for key, match in found]
    return list(dict.fromkeys(owners))
