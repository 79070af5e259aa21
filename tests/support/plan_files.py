"""Plan files to report on: real ones from the planner, and small ones written down by hand."""

from __future__ import annotations

from collections import Counter

from papilio.sharding.plan_file import (
    MemoryUse,
    Phases,
    PlanFile,
    PlannedOn,
    PlannedRank,
    PlannedTable,
    ShardPlace,
    StepPrediction,
)
from papilio.sharding.planner.make import make_plan
from tests.support.jobs import GIB, config_of, make_cluster, make_job

# Rows from ten to ten millions, in no order.
ROW_COUNTS = (10, 3_000_000, 250, 40_000, 9_000, 10_000_000, 77, 600_000)


def real_plan(num_tables=8, num_nodes=1, ranks_per_node=4, *, dim=32, num_groups=1, **settings):
    """What the planner makes of so many tables; `settings` are those of the recipe's `sharding` section."""
    rows = tuple(ROW_COUNTS[i % len(ROW_COUNTS)] + i for i in range(num_tables))
    cluster = make_cluster(num_nodes, ranks_per_node, num_groups=num_groups)
    job = make_job(rows, dim=dim, batch_size=256 * cluster.num_ranks)
    return make_plan(job, cluster, config_of(**settings), recipe="sample", papilio_version="0.1")


def table(name, *ranks, rows=1_000, dim=8, kind=None, ms=1.0, **changes):
    """A table of fp32 without optimizer state: table_wise on one rank, or cut by rows over several."""
    kind = kind or ("table_wise" if len(ranks) == 1 else "row_wise")
    cut = rows // len(ranks)
    places = tuple(
        ShardPlace(row=i * cut, column=0, num_rows=cut, num_columns=dim, rank=rank) for i, rank in enumerate(ranks)
    )
    copies = len(ranks) if kind == "data_parallel" else 1
    fields = {
        "name": name,
        "module": "model.tables",
        "feature": f"f_{name}",
        "num_embeddings": rows,
        "embedding_dim": dim,
        "pooling": "sum",
        "pooling_factor": 1.0,
        "precision": "fp32",
        "sharding_type": kind,
        "compute_kernel": "dense" if kind == "data_parallel" else "fused",
        "ranks": ranks,
        "shards": () if kind == "data_parallel" else places,
        "weights_bytes": copies * rows * dim * 4,
        "optimizer_bytes": 0,
        "phases": Phases(lookup_s=ms / 1e3),
    }
    return PlannedTable(**fields | changes)


def hand_made(*tables, num_ranks=4, gib=(), lookup_ms=1.0, overhead_ms=3.0, **changes):
    """A plan of one node with these tables; `gib` are the GiB of weights of each rank, else 1 each."""
    phases = Phases(lookup_s=lookup_ms / 1e3)
    counts = Counter(rank for table in tables for rank in table.ranks)
    ranks = tuple(
        PlannedRank(
            rank=rank,
            node=0,
            num_shards=counts[rank],
            memory=MemoryUse(weights_bytes=int((gib[rank] if gib else 1) * GIB)),
            phases=phases,
        )
        for rank in range(num_ranks)
    )
    step = StepPrediction(
        phases=phases,
        dense_s=0.0,
        all_reduce_s=0.0,
        dense_optimizer_s=0.0,
        overhead_s=overhead_ms / 1e3,
        total_s=(lookup_ms + overhead_ms) / 1e3,
    )
    fields = {
        "papilio_version": "0.1",
        "recipe": "by_hand",
        "machine": PlannedOn(
            hardware="some_machine",
            description="a machine",
            device="cuda",
            num_nodes=1,
            ranks_per_node=num_ranks,
            device_memory_bytes=80 * GIB,
            usable_memory_bytes=70 * GIB,
            host_memory_bytes=0,
        ),
        "global_batch_size": 4_096,
        "sparse_optimizer": "sgd",
        "precision": "fp32",
        "tables": tables,
        "ranks": ranks,
        "step": step,
    }
    return PlanFile(**fields | changes)
