"""`papilio plan diff OLD NEW`: what moved between two plans, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from sharding.plan_file import PlanFile


@dataclass(frozen=True)
class PlanDiff:
    """Two plans, to be told apart."""

    old: PlanFile
    new: PlanFile


def diff_plans(old: PlanFile, new: PlanFile) -> PlanDiff:
    """Compare two plans."""
    return PlanDiff(old, new)


def format_diff(diff: PlanDiff, num_columns: int) -> str:
    """Say in words how the plans differ, in at most `num_columns` columns."""
    return "the plans are the same" if diff.old == diff.new else "the plans differ"[:num_columns]
