"""When to save, what to keep, and where."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class CheckpointConfig(BaseModel):
    """Checkpoints of a run; one is always saved at the end, and one when the job is told to stop (SIGTERM)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every_steps: int | None = Field(None, ge=1, description="Save every so many steps.")
    every_minutes: float | None = Field(
        10.0, gt=0, description="Save when so many minutes have passed since the last save, at the next report."
    )
    keep_last: int = Field(2, ge=1, description="Newest checkpoints to keep.")
    keep_best: bool = Field(True, description="Save and keep the one with the highest validation AUC as well.")
    asynchronous: bool = Field(
        True, description="Go on training while a copy in host memory is written; otherwise wait for it."
    )
    folder: str | None = Field(
        None, description="Where to, also s3://bucket/prefix; `checkpoints` in the run folder by default."
    )
