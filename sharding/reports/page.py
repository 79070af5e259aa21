"""`papilio plan --html`: a plan as one page that needs nothing else."""

from __future__ import annotations

import html
import json
from typing import Any

from papilio.sharding.plan_file import Phases, PlanFile, PlannedTable
from papilio.sharding.reports.figures import MEMORY_NAMES, PHASE_NAMES, step_parts
from papilio.sharding.reports.page_frame import fill_page, packaged_text

PACKAGE = "papilio.sharding.reports"
TEMPLATE = "page.html"
STYLE = "page.css"
SCRIPTS = ("page_head.js", "page_charts.js", "page_tables.js", "page.js")
# Digits of seconds in the page's data: a hundredth of a microsecond.
SECOND_DIGITS = 8


def plan_page(plan: PlanFile) -> str:
    """Return a plan as an HTML page with its style, script and data inside."""
    ranks = "1 rank" if plan.machine.num_ranks == 1 else f"{plan.machine.num_ranks} ranks"
    title = f"{plan.recipe} on {ranks} of {plan.machine.hardware}"
    fillings = {
        "TITLE": html.escape(title),
        "STYLE": packaged_text(PACKAGE, STYLE),
        "DATA": _script_safe(page_data(plan)),
        "SCRIPT": "".join(packaged_text(PACKAGE, name) for name in SCRIPTS),
    }
    return fill_page(packaged_text(PACKAGE, TEMPLATE), fillings)


def page_data(plan: PlanFile) -> dict[str, Any]:
    """Return what the page's script draws: the plan with ranks as runs, and numbers in place of repeated names."""
    return {
        "recipe": plan.recipe,
        "version": plan.papilio_version,
        "machine": plan.machine.model_dump(mode="json"),
        "num_ranks": plan.machine.num_ranks,
        "batch_size": plan.global_batch_size,
        "optimizer": plan.sparse_optimizer,
        "precision": plan.precision,
        "total_s": plan.step.total_s,
        "samples_per_s": plan.samples_per_s,
        "parts": [{"key": key, "name": name, "s": _short(seconds)} for key, name, seconds in step_parts(plan)],
        "memory_names": list(MEMORY_NAMES.values()),
        "phase_names": list(PHASE_NAMES.values()),
        "ranks": [
            {
                "rank": rank.rank,
                "node": rank.node,
                "shards": rank.num_shards,
                "memory": [getattr(rank.memory, key) for key in MEMORY_NAMES],
                "host": rank.memory.host_bytes,
                "phases": _phases(rank.phases),
            }
            for rank in plan.ranks
        ],
        "tables": [_table(table) for table in plan.tables],
        "notes": list(plan.notes),
    }


def _table(table: PlannedTable) -> dict[str, Any]:
    return {
        "name": table.name,
        "module": table.module,
        "feature": table.feature,
        "rows": table.num_embeddings,
        "dim": table.embedding_dim,
        "pooling": table.pooling,
        "ids": table.pooling_factor,
        "precision": table.precision,
        "type": table.sharding_type,
        "kernel": table.compute_kernel,
        "cache": table.cache_load_factor,
        "ranks": _runs(table.ranks),
        "shards": len(table.shards),
        "weights": table.weights_bytes,
        "optimizer": table.optimizer_bytes,
        "phases": _phases(table.phases),
    }


def _phases(phases: Phases) -> list[float]:
    return [_short(getattr(phases, key)) for key in PHASE_NAMES]


def _runs(ranks: tuple[int, ...]) -> list[list[int]]:
    """Ranks in order as [first, last], each run of consecutive ones once."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return runs


def _short(seconds: float) -> float:
    return round(seconds, SECOND_DIGITS)


def _script_safe(data: dict[str, Any]) -> str:
    """JSON that no name can break out of: a script element ends at `</`, whatever it holds."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
