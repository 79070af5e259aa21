"""Symptoms of a column from which a model will learn nothing: counted chunk by chunk, cheap next to parsing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from papilio.data_pipeline.preprocess.column_codes import ColumnCodes
from papilio.data_pipeline.preprocess.raw_chunk import RawChunk

# Ids that are most likely something else, by kind; RE2 patterns over the distinct texts of a chunk.
SUSPECTS = {
    "null": r"(?i)^(nan|null|none|na|n/a|#n/a|<na>|\\n|nat|nil|undefined)$",
    "list": r"^[\[({]|[\])}]$",
    "decimal": r"^-?[0-9]+\.[0-9]*([eE][-+]?[0-9]+)?$|^-?[0-9]+[eE]\+[0-9]+$",
    "blank": r"^\s|\s$",
}
_ANY_SUSPECT = "|".join(SUSPECTS.values())
_SAMPLED_ROWS = 128


@dataclass
class ColumnSymptoms:
    """Over all chunks: of each dense column how often its commonest values occur and how many log1p made 0, of each
    categorical one how many ids are suspicious, by kind, and the commonest of these."""

    num_dense: int
    num_categorical: int
    modes: list[Counter[float]] = field(init=False)
    num_clipped: NDArray[np.int64] = field(init=False)
    suspects: list[dict[str, tuple[int, int, str]]] = field(init=False)

    def __post_init__(self) -> None:
        self.modes = [Counter() for _ in range(self.num_dense)]
        self.num_clipped = np.zeros(self.num_dense, np.int64)
        self.suspects = [{} for _ in range(self.num_categorical)]

    def add(self, meta: dict[str, Any]) -> None:
        """Count in what `symptoms_of` found in one chunk."""
        self.num_clipped += np.array(meta["num_clipped"], np.int64)
        for modes, (value, count) in zip(self.modes, meta["modes"], strict=True):
            modes[value] += count
        for suspects, found in zip(self.suspects, meta["suspects"], strict=True):
            for kind, (count, most, text) in found.items():
                before = suspects.get(kind, (0, 0, ""))
                _, best = max((before[1], before[2]), (most, text))
                suspects[kind] = (before[0] + count, max(before[1], most), best)


def symptoms_of(chunk: RawChunk) -> dict[str, Any]:
    """Return plain values for `ColumnSymptoms.add`."""
    return {
        "num_clipped": chunk.num_clipped.tolist(),
        "modes": [_mode_of(column) for column in chunk.dense.T],
        "suspects": [_suspects_of(column) for column in chunk.columns],
    }


def _mode_of(values: NDArray[np.float32]) -> tuple[float, int]:
    """A value that stands for at least half of the rows, if there is one, and how often it occurs."""
    if not len(values):
        return 0.0, 0
    distinct, counts = np.unique(values[:: -(-len(values) // _SAMPLED_ROWS)], return_counts=True)
    value = distinct[np.argmax(counts)]
    return float(value), int(np.count_nonzero(values == value))


def _suspects_of(column: ColumnCodes) -> dict[str, tuple[int, int, str]]:
    """By kind: how many values, how often the commonest of them occurs, and that one."""
    texts = column if column.texts is None else column.texts
    if not isinstance(texts.keys, pa.Array) or not len(texts.keys):
        return {}
    places = np.flatnonzero(_matches(texts.keys, _ANY_SUSPECT))
    keys, counts = texts.keys.take(pa.array(places)), texts.counts[places].astype(np.int64)
    found = {}
    for kind, pattern in SUSPECTS.items():
        is_match = _matches(keys, pattern)
        if is_match.any():
            place = int(np.argmax(np.where(is_match, counts, -1)))
            example = keys[place].as_py()[:40].decode(errors="replace")
            found[kind] = (int(counts[is_match].sum()), int(counts[place]), example)
    return found


def _matches(keys: pa.Array, pattern: str) -> NDArray[np.bool_]:
    matches: NDArray[np.bool_] = pc.match_substring_regex(keys, pattern).to_numpy(zero_copy_only=False)
    return matches
