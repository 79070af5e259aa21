"""Heartbeats, for tests."""

from __future__ import annotations

from papilio.trainer.elastic.health.heartbeat import Heartbeat


def heartbeat_of(rank: int, step: int, **settings: object) -> Heartbeat:
    """A heartbeat of a rank in training, on a host of its own."""
    values = {"phase": "training", "num_collectives": 7, "count": 1, "idle_s": 0.5, "unix_s": 1e9, "has_left": False}
    return Heartbeat(rank=rank, host=f"host-{rank}", step=step, **{**values, **settings})
