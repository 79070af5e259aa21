"""How a run's tables may be spread over its ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

ShardingTypeName = Literal["table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise"]


class ShardingConfig(BaseModel):
    """The `sharding` section of a recipe.

    data_parallel is not offered: TorchRec silently drops the fused optimizer of such tables. Nor is grid_shard: with
    mean pooling TorchRec 1.8.0 divides by the wrong counts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    types: tuple[ShardingTypeName, ...] = Field(
        ("table_wise", "row_wise"),
        min_length=1,
        description="Sharding types the planner may choose from, for every table without an entry in table_types.",
    )
    table_types: dict[str, ShardingTypeName] = Field(
        default_factory=dict, description="Sharding type of single tables, by table name (t_<feature>)."
    )
    min_partition: int = Field(
        16, ge=4, description="Fewest columns of a column shard (column_wise, table_column_wise)."
    )
    memory_per_rank_gib: float | None = Field(
        None, gt=0, description="GiB of a rank's memory the planner may fill; by default what the machine has."
    )
    reserve_fraction: float = Field(
        0.15, ge=0, lt=1, description="Share of that memory kept free for activations, buffers and the framework."
    )
