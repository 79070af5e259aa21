"""The table of a preflight: a line a check, or for each thing that is wrong, with its host and its fix."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence

from papilio.data_pipeline.terminal import table_columns
from papilio.launch.preflight.finding import Evidence, Finding, named

MAX_HOST_WIDTH = 24


def format_report(evidence: Evidence, findings: Sequence[Finding], took_s: float) -> str:
    """Return the table, and a verdict."""
    hosts = [named(finding.hosts, evidence.num_hosts) if finding.hosts else "-" for finding in findings]
    check_width = max(len(finding.check) for finding in findings)
    host_width = min(MAX_HOST_WIDTH, max(map(len, hosts)))
    indent = " " * (6 + check_width + 2 + host_width + 2)
    shallow = " " * (6 + check_width + 2)  # commands should break as little as can be
    columns = table_columns()
    lines = [_title(evidence, took_s), ""]
    for finding, host in zip(findings, hosts, strict=True):
        head = f"{finding.status:4}  {finding.check:{check_width}}  {host:{host_width}}  "
        lines += _wrapped(finding.found, head, indent, columns)
        if finding.fix:
            lines += _wrapped(finding.fix, f"{shallow}fix: ", f"{shallow}      ", columns)
    return "\n".join([*lines, "", _verdict(findings)])


def report_as_json(evidence: Evidence, findings: Sequence[Finding], took_s: float) -> str:
    """Return findings and facts as JSON."""
    return json.dumps(
        {
            "recipe": evidence.config.name,
            "is_ready": all(finding.status != "FAIL" for finding in findings),
            "took_s": round(took_s, 3),
            "findings": [dataclasses.asdict(finding) for finding in findings],
            "hosts": [
                {"name": evidence.name(index), "facts": facts.model_dump() if facts else None}
                for index, facts in enumerate(evidence.facts)
            ],
            "plan": evidence.plan.model_dump(),
            "links": [links.model_dump() if links else None for links in evidence.links],
        },
        indent=1,
    )


def _title(evidence: Evidence, took_s: float) -> str:
    hosts = f"{evidence.num_hosts} host{'s' if evidence.num_hosts > 1 else ''}"
    ranks = f"{evidence.nproc} rank{'s' if evidence.nproc > 1 else ''}"
    hardware = evidence.hardware or evidence.plan.hardware or "hardware not known"
    return f"preflight of {evidence.config.name} on {hosts} x {ranks} ({hardware}), {took_s:.1f} s"


def _verdict(findings: Sequence[Finding]) -> str:
    failed = sum(finding.status == "FAIL" for finding in findings)
    warned = sum(finding.status == "warn" for finding in findings)
    warnings = f" ({warned} warning{'s' if warned > 1 else ''})" if warned else ""
    if failed:
        return f"not ready: {failed} thing{'s' if failed > 1 else ''} to fix{warnings}"
    return f"ready{warnings}: this job will run here"


def _wrapped(text: str, first: str, others: str, columns: int) -> list[str]:
    return textwrap.wrap(
        text, columns, initial_indent=first, subsequent_indent=others, break_on_hyphens=False, break_long_words=False
    )
