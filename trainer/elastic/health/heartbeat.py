"""What each rank publishes once a second: where its training stands, and what it measures of its own work; no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class Heartbeat:
    """A rank's heartbeat: where its training stands.

    `count` grows with every heartbeat; `num_collectives` is how many the rank has begun;
    `idle_s` is how long nothing of this had moved when `unix_s` was read. `has_left` says that no more will come;
    `figures` are of its own work, once it trains.
    """

    rank: int
    host: str
    step: int
    phase: str
    num_collectives: int
    count: int
    idle_s: float
    unix_s: float
    has_left: bool = False
    figures: RankFigures | None = None

    @classmethod
    def from_json(cls, text: bytes | str) -> Heartbeat:
        """Rebuild it from `to_json`'s result."""
        tree = json.loads(text)
        figures = tree.pop("figures", None)
        return cls(**tree, figures=None if figures is None else RankFigures.from_dict(figures))

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps(asdict(self))
