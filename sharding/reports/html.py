"""Kept until trainer/plan.py imports plan_page from sharding.reports.page."""

from sharding.reports.page import plan_page

__all__ = ["plan_page"]
