"""What `papilio plan` is asked to do; imports no torch, so that the command line and its child share it."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, Field


class PlanOptions(BaseModel):
    """What to plan, for which machines, and what to show of it.

    The command line reads its help and defaults here, and passes the whole as one argument to the process that plans.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str = Field(description="path of a recipe .toml, or the bare name of one that comes with Papilio")
    overrides: tuple[str, ...] = Field((), description="settings of the recipe, as --section.key=value")
    hardware: str | None = Field(None, description="profile of the hosts, or a file of `papilio calibrate`")
    num_nodes: int = Field(1, description="hosts")
    ranks_per_node: int | None = Field(None, description="ranks of a host (default: the profile's)")
    explain: str | None = Field(None, description="every option for one table: cost, memory, why it lost")
    output: str | None = Field(None, description="write the plan as JSON, for --sharding.plan and `plan diff`")
    html: str | None = Field(None, description="write the report as one page for a browser")
    as_json: bool = Field(False, description="print the plan as JSON instead of the report")
    show_all: bool = Field(False, description="list every table and rank, however many")

    def to_argument(self) -> str:
        """Return the options as one command-line argument.

        ASCII: a path that is not UTF-8 reaches Python as lone surrogates, which pydantic's own JSON refuses.
        """
        return json.dumps(self.model_dump())

    @classmethod
    def from_argument(cls, argument: str) -> PlanOptions:
        """Return the options of `to_argument`."""
        return cls.model_validate(json.loads(argument))
