"""What `papilio generate` is asked for."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from papilio.data_pipeline.generate.shapes import SHAPES


class GenerateOptions(BaseModel):
    """Options of `papilio generate`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: str = Field(default="criteo_small", description=f"Columns of the data: {', '.join(SHAPES)}.")
    num_rows: int = Field(ge=20, description="Rows over all splits: 90 % train, 5 % validation, 5 % test.")
    output: str = Field(description="Folder to write to.")
    format: Literal["shards", "tsv"] = Field(
        default="shards", description="shards: a data set to train on; tsv: a raw Criteo train.txt to preprocess."
    )
    seed: int = Field(default=0, description="Another seed gives other rows, labelled by the same teacher.")
    rows_per_shard: int = Field(default=1_048_576, ge=1, description="Rows of a shard file.")
    show_progress: bool = Field(default=True, description="Show how far the work is.")

    @field_validator("shape")
    @classmethod
    def _check_shape(cls, name: str) -> str:
        if name not in SHAPES:
            raise ValueError(f"there is no shape {name!r}; choose one of {', '.join(SHAPES)}")
        return name

    @model_validator(mode="after")
    def _check_format(self) -> GenerateOptions:
        shape = SHAPES[self.shape]
        if self.format == "tsv" and (shape.num_dense, shape.pooling_factors) != (13, (1,) * 26):
            raise ValueError(f"format tsv holds 13 counts and 26 single ids; shape {self.shape!r} needs format shards")
        return self
