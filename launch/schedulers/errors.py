"""What goes wrong when a job is started, asked about or ended."""

from __future__ import annotations


class SchedulerError(ValueError):
    """A scheduler cannot do what was asked; the message says why and what can be done."""
