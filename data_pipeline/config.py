"""How a run reads its data."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class DataConfig(BaseModel):
    """The `data` section of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="Folder of the data set: made by `papilio preprocess` or `papilio generate`.")
    shape: str | None = Field(
        None,
        description="What to plan for where the data set is not there yet: a shape of `papilio generate`, or a TOML "
        "file that lists columns. Training needs the data set itself.",
    )
    shuffle: bool = Field(
        default=True, description="Read the training split in another order each epoch; else in row order."
    )
    shuffle_block_rows: int = Field(
        default=64,
        ge=1,
        description="Consecutive rows that stay together when shuffling; 1 shuffles single rows, which reads slower.",
    )
    prefetch_batches: int = Field(
        4, ge=0, description="Batches prepared ahead by a thread of each rank; 0 prepares them when they are asked for."
    )
    verify_checksums: bool = Field(
        True, description="Check each shard against its checksum when it is first read (about 1 s per GB and rank)."
    )
