"""The plan file: where every shard goes, what each rank holds and does, and what was predicted; JSON with a version.

It is at once what `papilio plan --output` writes, what the reports show, and what `sharding.plan` gives to training.
No torch is imported here; sharding/plan_conversion.py makes TorchRec's ShardingPlan of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from papilio.sharding.config import KernelName, ShardingTypeName

FORMAT_VERSION = 4
MAX_SHOWN = 40
# More is no memory, no count and no time of this world, and would overflow where it is shown.
Count = Annotated[int, Field(ge=0, le=1 << 62)]
StepSeconds = Annotated[float, Field(ge=0, le=1e9)]


class PlanFileError(ValueError):
    """A plan file that cannot be used; the message names the file and the fix."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Phases(_Section):
    """Seconds of a step's embedding work, in the order of the step.

    Attributes:
        input_dist_s: ids on their way to the shards.
        lookup_s: rows read and pooled.
        output_dist_s: pooled embeddings on their way to the samples.
        gradient_dist_s: their gradients on their way back (data_parallel: the all-reduce of the table's gradient).
        update_s: rows updated by the fused optimizer.
    """

    input_dist_s: float = 0.0
    lookup_s: float = 0.0
    output_dist_s: float = 0.0
    gradient_dist_s: float = 0.0
    update_s: float = 0.0

    @property
    def total_s(self) -> float:
        """All of them, one after the other."""
        return self.input_dist_s + self.lookup_s + self.output_dist_s + self.gradient_dist_s + self.update_s


class ShardPlace(_Section):
    """A rectangle of a table and the rank that holds it; for data_parallel there is none, each rank holds the whole."""

    row: int = Field(ge=0)
    column: int = Field(ge=0)
    num_rows: int = Field(ge=0)
    num_columns: int = Field(ge=1)
    rank: int = Field(ge=0)


class PlannedTable(_Section):
    """One table's place. Bytes are over all its shards; `phases` are those of its most loaded rank."""

    name: str
    module: str
    feature: str
    num_embeddings: Count
    embedding_dim: Count
    pooling: str
    pooling_factor: float
    precision: str
    sharding_type: ShardingTypeName
    compute_kernel: KernelName
    cache_load_factor: float | None = None
    ranks: tuple[int, ...]
    shards: tuple[ShardPlace, ...]
    weights_bytes: Count
    optimizer_bytes: Count
    phases: Phases


class MemoryUse(_Section):
    """Bytes of one rank at the peak of a step. Those of the device first, the host's (UVM) last."""

    weights_bytes: Count = 0
    optimizer_bytes: Count = 0
    cache_bytes: Count = 0
    gradients_bytes: Count = 0
    activations_bytes: Count = 0
    input_bytes: Count = 0
    dense_bytes: Count = 0
    checkpoint_bytes: Count = 0
    framework_bytes: Count = 0
    host_bytes: Count = 0

    @property
    def device_bytes(self) -> int:
        """All but the host's."""
        return int(sum(self.model_dump().values())) - self.host_bytes


class PlannedRank(_Section):
    """What one rank holds and does in a step."""

    rank: Count
    node: Count
    num_shards: Count
    memory: MemoryUse
    phases: Phases


class StepPrediction(_Section):
    """Seconds of a step of the whole job; `total_s` is less than the sum of the parts where work overlaps.

    Attributes:
        phases: of the embeddings, each the longest over the ranks.
        dense_s: MLPs and interaction, forward and backward.
        all_reduce_s: of the dense gradients.
        dense_optimizer_s: update of the dense part.
        overhead_s: batch, loss, bookkeeping of every sharding group and table.
        replica_sync_s: averaging the groups' tables (2D), per step.
        hidden_s: communication behind other work.
        total_s: a step.
    """

    phases: Phases
    dense_s: float
    all_reduce_s: float
    dense_optimizer_s: float
    overhead_s: float
    replica_sync_s: float = 0.0
    hidden_s: float = 0.0
    total_s: StepSeconds


class PlannedOn(_Section):
    """The machines that a plan was made for."""

    hardware: str
    description: str
    device: Literal["cpu", "cuda"]
    num_nodes: int = Field(ge=1, le=1 << 31)
    ranks_per_node: int = Field(ge=1, le=1 << 31)
    num_groups: int = Field(1, ge=1)
    device_memory_bytes: Count
    usable_memory_bytes: Count
    host_memory_bytes: Count

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole job."""
        return self.num_nodes * self.ranks_per_node

    @property
    def group_size(self) -> int:
        """Ranks that one copy of the tables is spread over."""
        return self.num_ranks // self.num_groups


class PlanFile(_Section):
    """A whole plan. `ranks` are those of the first group of ranks; all groups are alike."""

    format_version: int = FORMAT_VERSION
    papilio_version: str
    recipe: str
    machine: PlannedOn
    global_batch_size: Count
    sparse_optimizer: str
    precision: str
    tables: tuple[PlannedTable, ...]
    ranks: tuple[PlannedRank, ...]
    step: StepPrediction
    notes: tuple[str, ...] = ()

    @property
    def samples_per_s(self) -> float:
        """Samples that the job is predicted to train each second."""
        return self.global_batch_size / self.step.total_s

    def to_json(self) -> str:
        """Return the file's text; a plan's text is the same whenever the plan is."""
        tree = self.model_dump(mode="json")
        return json.dumps({**tree, "checksum": checksum_of(tree)}, indent=1) + "\n"


def checksum_of(tree: Mapping[str, Any]) -> str:
    """Return the checksum that belongs to a plan's parsed text: SHA-256 of all but the checksum, 16 hex digits."""
    content = {key: value for key, value in tree.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def shown(value: object) -> str:
    """Return what a file says as an error may show it: cut, and without what would move a terminal's cursor."""
    return ascii(str(value))[1:-1][:MAX_SHOWN]


def read_plan_file(path: str) -> PlanFile:
    """Read a plan file.

    Raises:
        PlanFileError: there is none, it is damaged or edited, or another version wrote it.
    """
    try:
        text = Path(path).read_text("utf-8")
    except FileNotFoundError:
        raise PlanFileError(
            f"plan file {path} does not exist; `papilio plan --recipe R --output {path}` makes one"
        ) from None
    except UnicodeDecodeError as error:
        raise PlanFileError(f"plan file {path} is damaged ({error}); make it again with `papilio plan`") from None
    except (OSError, ValueError) as error:  # a folder, no permission, a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise PlanFileError(f"plan file {path} cannot be read ({reason}); name a file of `papilio plan`") from None
    return plan_from_json(text, path)


def plan_from_json(text: str, source: str) -> PlanFile:
    """Read a plan from the text of a file; `source` names it in errors.

    Raises:
        PlanFileError: it is damaged or edited, or another version wrote it.
    """
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, a number of 5,000 digits, nested too deep
        raise PlanFileError(f"plan file {source} is damaged ({error}); make it again with `papilio plan`") from None
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version != FORMAT_VERSION:
        written_by = tree.get("papilio_version", "unknown") if isinstance(tree, dict) else "unknown"
        raise PlanFileError(
            f"plan file {source} has format version {shown(version)} (written by Papilio {shown(written_by)}); "
            f"this Papilio reads {FORMAT_VERSION}: make the plan again with `papilio plan`"
        )
    _check_checksum(tree, source)
    try:
        plan = PlanFile.model_validate({key: value for key, value in tree.items() if key != "checksum"})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise PlanFileError(f"plan file {source} is damaged ({key}: {first['msg']}); make it again") from None
    if not plan.step.total_s:  # samples a second are divided by it
        raise PlanFileError(f"plan file {source} is damaged (step.total_s: no step takes 0 s); make it again")
    return plan


def _check_checksum(tree: Mapping[str, Any], source: str) -> None:
    found, right = tree.get("checksum"), checksum_of(tree)
    if found != right:
        raise PlanFileError(
            f"plan file {source} is not as it was written: its checksum is {shown(found)}, its content has {right}; "
            "make it again with `papilio plan`, or, if you edited it on purpose, set its checksum to that"
        )
