"""What goes wrong when a job is started, asked about or ended."""

from __future__ import annotations

from papilio.launch.usage import UsageError


class SchedulerError(ValueError):
    """A scheduler cannot do what was asked; the message says why and what can be done."""


class RequestError(SchedulerError, UsageError):
    """A job or setting that a scheduler cannot take; what to change is on the command line."""
