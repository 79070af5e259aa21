"""What `papilio predict` is asked to do; imports neither torch nor NumPy, so that a command line builds fast."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class PredictOptions(BaseModel):
    """What to score, and where to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    package: str = Field(description="Folder of the package.")
    output: str = Field(description="Parquet file of the scores; it has its name only once it is whole.")
    data: str | None = Field(None, description="Folder of a preprocessed data set.")
    split: Literal["train", "validation", "test"] = Field("test", description="Rows of the data set to score.")
    inputs: tuple[str, ...] = Field((), description="Instead of a data set: raw files, plain, .gz or .zst; any path.")
    source: Literal["criteo", "table"] | None = Field(
        None, description="Of raw files: criteo, Kaggle or Terabyte text; table, CSV, TSV, Parquet. Labels may lack."
    )
    fastest: bool = Field(
        False,
        description="Score with the package's format `fastest`, whose dense part may be in bf16 or int8, so that "
        "answers depend a little on the batch; refused where it cannot be used. Without it answers are the exact ones.",
    )
    trust_formats: bool = Field(
        False, description="With --fastest: use the format though others built it, which runs their code."
    )
    max_bad_rows: int = Field(0, ge=0, description="Malformed raw rows that get no score before it is an error.")
    threads: int | None = Field(None, ge=1, description="Threads of the dense layers; all cores by default.")
    show_progress: bool = Field(True, description="Progress bar on a terminal, a line now and then in a log.")

    @model_validator(mode="after")
    def _check_together(self) -> PredictOptions:
        if (self.data is None) == (not self.inputs):
            raise ValueError("give either --data, a data set, or --input, raw files")
        if bool(self.inputs) != (self.source is not None):
            raise ValueError("--input goes with --source criteo or --source table, and --data without")
        if self.trust_formats and not self.fastest:
            raise ValueError("--trust-formats goes with --fastest: without it no code of a package is run")
        if os.path.splitext(self.output)[1] != ".parquet":
            raise ValueError(f"--output {self.output} must end in .parquet")
        return self
