"""What goes wrong in planning."""

from __future__ import annotations


class PlanError(ValueError):
    """Tables that cannot be placed as asked; the message names the table, the rank or the memory, and the fix."""
