"""What each host finds out, as it travels to the first host, which judges it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Card(_Facts):
    """How the others reach a host. `name` is what torch tells them; `data_port` is open on it during the preflight.

    `address` is the one from which it reached the first host, `gloo_address` the one that gloo would give the others;
    `token` says that it is this host and no other.
    """

    name: str
    data_port: int
    gloo_address: str
    address: str = "127.0.0.1"
    token: str = ""


class Reached(_Facts):
    """How one host reached another one; empty strings where nothing was wrong."""

    host: int
    addresses: tuple[str, ...] = ()
    name_error: str = ""
    reverse_error: str = ""
    port_error: str = ""
    tried: str = Field("", description="Address and port that were tried.")


class Gpu(_Facts):
    """One GPU as nvidia-smi shows it; None where the driver does not say."""

    index: int
    name: str
    memory_bytes: int
    used_bytes: int
    uncorrected_errors: int | None
    is_slowed: bool
    celsius: int | None


class Folder(_Facts):
    """A folder that every host writes to. `marks` are the tokens of all hosts whose mark is seen there."""

    path: str
    error: str = ""
    free_bytes: int | None = None
    marks: tuple[str, ...] = ()


class DataFacts(_Facts):
    """The data set as one host reads it; `problems` are whole sentences that end with a fix."""

    path: str
    problems: tuple[str, ...] = ()
    manifest_crc32: int | None = None
    num_shards: int = 0
    num_bytes: int = 0
    checked_shards: tuple[str, ...] = ()
    checked_bytes: int = 0


class HostFacts(_Facts):
    """Everything that one host found out before torch was loaded."""

    clock_ahead_s: float
    clock_error_s: float
    versions: dict[str, str]
    code: dict[str, str] = Field(description="Hash of each package's files, by package.")
    settings: dict[str, str] = Field(default_factory=dict, description="Of the recipe as read here, JSON by key.")
    reached: tuple[Reached, ...]
    interface: str = Field("", description="The network interface that leads to the first host.")
    gpus: tuple[Gpu, ...]
    gpu_error: str = ""
    driver: str = ""
    num_cores: int
    memory_bytes: int
    shared_memory_bytes: int
    folders: tuple[Folder, ...]
    data: DataFacts


class RankSpeed(_Facts):
    """What one rank measured, with messages of so many bytes."""

    rank: int
    backend: str
    message_bytes: int
    all_to_all_s: float
    all_reduce_s: float
    neighbour_s: float = Field(description="To receive a message from the same rank of the host before.")


class LinkFacts(_Facts):
    """What the ranks of one host measured; `errors` are of ranks that did not come to the end."""

    speeds: tuple[RankSpeed, ...] = ()
    errors: tuple[str, ...] = ()


class PlanFacts(_Facts):
    """What the planner says of the job; `error` is its message where there is no plan."""

    error: str = ""
    hardware: str = ""
    device: str = ""
    rank_device_bytes: tuple[int, ...] = ()
    rank_host_bytes: tuple[int, ...] = ()
    num_ranks: int = 0
    model_bytes: int = Field(0, description="Weights and optimizer state of all tables, once.")
    step_s: float = 0.0
    samples_per_s: float = 0.0
