"""What goes wrong in planning."""

from __future__ import annotations

from papilio.data_pipeline.errors import PapilioError


class PlanError(PapilioError, ValueError):
    """Tables that cannot be placed as asked; the message names the table, the rank or the memory, and the fix."""
