"""Small jobs and clusters to plan for, on the profile of a known machine."""

from __future__ import annotations

from papilio.sharding.config import ShardingConfig
from papilio.sharding.hardware import load_hardware
from papilio.sharding.planner.job import Cluster, DenseWork, Job, Table

GIB = 1 << 30


def make_tables(rows, dim=16, pooling_factor=1.0):
    return tuple(
        Table(f"t_{i}", "model.tables", f"f_{i}", count, dim, pooling_factor=pooling_factor)
        for i, count in enumerate(rows)
    )


def make_job(rows=(1_000, 2_000, 3_000), *, dim=16, batch_size=256, optimizer="rowwise_adagrad", pooling_factor=1.0):
    dense = DenseWork(((13, 64), (64, dim), (40, 1)), 3_000, len(rows) + 1, dim, 200)
    return Job(
        tables=make_tables(rows, dim, pooling_factor),
        dense=dense,
        num_dense_features=13,
        global_batch_size=batch_size,
        sparse_optimizer=optimizer,
        dense_optimizer="adagrad",
    )


def make_cluster(num_nodes=1, ranks_per_node=4, hardware="dgx_a100", num_groups=1):
    return Cluster(load_hardware(hardware), num_nodes, ranks_per_node, num_groups)


def config_of(**settings):
    return ShardingConfig.model_validate(settings)
