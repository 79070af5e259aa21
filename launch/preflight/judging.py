"""Judges what the hosts found: every check in the order in which fixes should be made."""

from __future__ import annotations

from papilio.launch.preflight.finding import Evidence, Finding
from papilio.launch.preflight.judging_hosts import (
    check_clocks,
    check_code,
    check_gpus,
    check_memory,
    check_settings,
    check_versions,
)
from papilio.launch.preflight.judging_links import check_links
from papilio.launch.preflight.judging_network import check_arrival, check_interfaces, check_names, check_ports
from papilio.launch.preflight.judging_storage import check_data, check_folders, check_room


def judge(evidence: Evidence) -> list[Finding]:
    """Return what every check found."""
    checks = (
        check_arrival,
        check_names,
        check_ports,
        check_interfaces,
        check_clocks,
        check_versions,
        check_code,
        check_settings,
        check_gpus,
        check_memory,
        check_folders,
        check_room,
        check_data,
        check_plan,
        check_links,
    )
    return [finding for check in checks for finding in check(evidence)]


def check_plan(evidence: Evidence) -> list[Finding]:
    """Is there a plan that fits the machines of the profile?"""
    plan = evidence.plan
    if plan.error:
        return [Finding("plan", "FAIL", (), plan.error, "papilio plan explains; its --explain TABLE shows each option")]
    most = max(plan.rank_device_bytes, default=0) / (1 << 30)
    return [
        Finding(
            "plan",
            "ok",
            (),
            f"fits {plan.num_ranks} ranks on {plan.hardware}: {most:.2f} GiB on the fullest rank, "
            f"{plan.samples_per_s:,.0f} samples/s expected",
        )
    ]
