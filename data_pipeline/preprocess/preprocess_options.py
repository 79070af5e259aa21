"""What `papilio preprocess` is asked to do; imports neither torch nor pyarrow, so that a command line builds fast."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from papilio.data_pipeline.schema import NUM_RESERVED_IDS

# One worker needs up to 150 MiB: with more than this many by default the whole would pass 1.5 GiB.
DEFAULT_MAX_WORKERS = 8
ROWS_ALIGNMENT = 4096


class PreprocessOptions(BaseModel):
    """Everything that decides the output, and how the work is done."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Literal["criteo", "table"] = Field(description="criteo: Kaggle or Terabyte text; table: CSV, TSV, Parquet.")
    inputs: tuple[str, ...] = Field(
        min_length=1, description="Files in order (any iopath path), plain, .gz or .zst; the order is that of time."
    )
    output: str = Field(description="Folder of the data set to make; local. Work in progress is kept in it.")
    schema_path: str | None = Field(None, description="Schema file (TOML) of a table; a Criteo file needs none.")
    frequency_threshold: int | None = Field(
        None, ge=1, description="Ids seen fewer times in training share one row; replaces the schema's (default 1)."
    )
    num_buckets: int | None = Field(
        None,
        gt=NUM_RESERVED_IDS,
        lt=2**31,
        description="Hash ids to this many rows a feature instead of building vocabularies.",
    )
    max_ids: int | None = Field(
        None,
        ge=1,
        le=2**31 - 1 - NUM_RESERVED_IDS,
        description="Ids kept in a vocabulary at most, the most frequent; replaces the schema's (40 million).",
    )
    split: Literal["days", "fraction", "random"] = Field(
        "days",
        description="days: the last file (of a single file the last seventh of its rows) is halved into validation and "
        "test; fraction: in row order; random: by a hash of the seed and the row number.",
    )
    fractions: tuple[float, float, float] = Field(
        (0.8, 0.1, 0.1), description="Shares of train, validation and test, for the splits `fraction` and `random`."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of the split `random`.")
    max_bad_rows: int = Field(0, ge=0, description="Malformed rows set aside in bad_rows.tsv before it is an error.")
    num_workers: int | None = Field(
        None, ge=1, description=f"Processes; by default one a core, at most {DEFAULT_MAX_WORKERS} to bound memory."
    )
    rows_per_shard: int = Field(
        262_144,
        ge=ROWS_ALIGNMENT,
        multiple_of=ROWS_ALIGNMENT,
        description="Rows of each shard but a split's last; fewer where rows "
        "are so long that a shard would pass 128 MiB.",
    )
    show_progress: bool = Field(True, description="Progress bar on a terminal, a line now and then in a log.")

    @model_validator(mode="after")
    def _check_together(self) -> PreprocessOptions:
        if self.source == "table" and self.schema_path is None:
            raise ValueError("a table needs schema_path, the TOML file that names its columns")
        if self.source == "criteo" and self.schema_path is not None:
            raise ValueError("a Criteo file has a fixed schema; leave schema_path out, or use source = 'table'")
        if not (min(self.fractions) >= 0 and abs(sum(self.fractions) - 1) <= 1e-9):  # also false of NaN
            raise ValueError(f"fractions must be three shares that add up to 1, not {self.fractions}")
        return self

    @property
    def worker_count(self) -> int:
        """Processes to use."""
        return self.num_workers or min(os.cpu_count() or 1, DEFAULT_MAX_WORKERS)
