"""How a run's tables may be spread over its ranks, and what passes between the ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ShardingTypeName = Literal[
    "data_parallel", "table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "grid_shard"
]
# fused: tables in the device's own memory; fused_uvm: in the host's, read over the link; fused_uvm_caching: in the
# host's, with a cache on the device; dense: a replica updated by a dense optimizer (data_parallel only).
KernelName = Literal["fused", "fused_uvm", "fused_uvm_caching", "dense"]
CommunicationPrecision = Literal["fp32", "fp16", "bf16", "int8"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TableConstraint(_Section):
    """What must hold for some tables. Of two constraints that match a table, the later one's fields win."""

    tables: tuple[str, ...] = Field(
        min_length=1, description="Table names (t_<feature>) or patterns of them with *, ? and [ab]."
    )
    types: tuple[ShardingTypeName, ...] | None = Field(None, min_length=1, description="Sharding types to choose from.")
    kernels: tuple[KernelName, ...] | None = Field(None, min_length=1, description="Compute kernels to choose from.")
    ranks: tuple[int, ...] | None = Field(None, min_length=1, description="Ranks that may hold shards of the tables.")
    min_partition: int | None = Field(None, ge=4, description="Fewest columns of a column shard.")
    cache_load_factor: float | None = Field(
        None, gt=0, lt=1, description="Share of a table's rows that fused_uvm_caching keeps on the device."
    )
    keep_together: bool = Field(False, description="Place all these tables, each whole, on one rank.")


class CommunicationConfig(_Section):
    """Precision in which pooled embeddings (forward) and their gradients (backward) travel between ranks."""

    forward: CommunicationPrecision = "fp32"
    backward: CommunicationPrecision = "fp32"


class ReplicasConfig(_Section):
    """2D parallelism: groups of ranks that each hold all tables (TorchRec's DMPCollection).

    The tables are sharded inside each group; the groups train on different samples and average their tables every
    `sync_every_steps` steps, and before they are evaluated or saved; never with `independent_tables`. The dense part is
    synchronized at every step, always.

    Each group updates its tables as if its own samples were the whole batch: with the gradient of the mean over them,
    `num_groups` times their share of the whole batch's. For SGD averaged after every step the mean of the tables then
    moves just as one copy trained on the whole batch. Steps of the Adagrad family do not grow with the gradient:
    averaged after every step they are shorter by about the square root of `num_groups`, which
    optimizer.sparse.learning_rate can make good.
    """

    num_groups: int = Field(1, ge=1, description="Groups; divides the number of ranks. 1: no replicas.")
    sync_every_steps: int = Field(1, ge=1, description="Steps between two averagings of the groups' tables.")
    independent_tables: bool = Field(
        False, description="Never average: each group learns tables of its own from its own samples."
    )


class ShardingConfig(_Section):
    """The `sharding` section of a recipe."""

    plan: str | None = Field(
        None, description="Plan file written by `papilio plan --output`; without one the planner decides."
    )
    hardware: str | None = Field(
        None,
        description="Hardware the planner estimates with: a profile's name, or a file that `papilio calibrate` wrote; "
        "by default the generic profile of the device at hand.",
    )
    types: tuple[ShardingTypeName, ...] = Field(
        ("table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "grid_shard"),
        min_length=1,
        description="Sharding types the planner may choose from.",
    )
    kernels: tuple[KernelName, ...] = Field(
        ("fused",), min_length=1, description="Compute kernels the planner may choose from (dense: data_parallel only)."
    )
    min_partition: int = Field(
        16, ge=4, description="Fewest columns of a column shard (column_wise, table_column_wise, grid_shard)."
    )
    cache_load_factor: float = Field(
        0.2, gt=0, lt=1, description="Share of a table's rows that fused_uvm_caching keeps on the device."
    )
    constraints: tuple[TableConstraint, ...] = Field((), description="Exceptions for single tables or patterns.")
    memory_per_rank_gib: float | None = Field(
        None, gt=0, description="GiB of a rank's memory that the plan may fill; by default what the hardware has."
    )
    reserve_fraction: float = Field(
        0.1, ge=0, lt=1, description="Share of that memory kept free for fragmentation and what no model foresees."
    )
    communication: CommunicationConfig = CommunicationConfig()
    replicas: ReplicasConfig = ReplicasConfig()

    @model_validator(mode="after")
    def _check(self) -> ShardingConfig:
        if "dense" in self.kernels and "data_parallel" not in self.types and len(self.kernels) == 1:
            raise ValueError("kernels = ['dense'] fits data_parallel only; add 'fused'")
        return self
