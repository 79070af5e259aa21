"""Heartbeats, for tests."""

from __future__ import annotations

from papilio.trainer.elastic.health.health_store import Sign


def sign_of(rank: int, step: int, **settings: object) -> Sign:
    """A sign of a rank in training, on a host of its own."""
    values = {"phase": "training", "num_collectives": 7, "count": 1, "idle_s": 0.5, "unix_s": 1e9, "has_left": False}
    return Sign(rank=rank, host=f"host-{rank}", step=step, **{**values, **settings})
