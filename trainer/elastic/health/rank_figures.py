"""What a rank says of its own work, in its heartbeat; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RankFigures:
    """Measured by one rank on what it does without the others.

    Attributes:
        train_s: seconds of training, as `wait_s` growing from the beginning of the run.
        wait_s: seconds of these that this rank's loader let it wait.
        num_timed: steps timed so far; the medians are over the latest of them.
        lookup_ms: forward pass of the lookups in this rank's shards; None before a step was timed.
        dense_ms: forward pass of the dense layers, the same work on all ranks.
        tables: of the bytes read by the lookups, the tables with most of them and their share.
    """

    train_s: float
    wait_s: float
    num_timed: int = 0
    lookup_ms: float | None = None
    dense_ms: float | None = None
    tables: tuple[tuple[str, float], ...] = ()

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> RankFigures:
        """Rebuild it from plain values."""
        return cls(**{**tree, "tables": tuple((name, share) for name, share in tree["tables"])})
