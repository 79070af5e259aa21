"""What `papilio serve` is asked to do; imports neither torch nor NumPy, so that a command line builds fast."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

# For the environment of a process before it loads torch, and with it libgomp. Threads that spin while they wait gain a
# lone copy up to 1.8 times on an idle machine, but take the cores from others: two copies of two threads on two cores
# are 7 to 12 times slower (benchmarks/colocation.py, RMC2 and RMC3, 2026-11-21).
PASSIVE_WAITS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


OTHER_PORT = "choose another --port (0 takes a free one), or --host"


class ServeError(ValueError):
    """A server that cannot start; the message says why."""


class ServeOptions(BaseModel):
    """A server and its limits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    package: str = Field(description="Folder of the package, or a link to one; SIGHUP looks again where it leads.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(8000, ge=0, lt=65536, description="Port to listen on; 0 takes a free one and prints it.")
    workers: int = Field(1, ge=1, le=256, description="Processes; they share the port and the mapped tables.")
    exact: bool = Field(
        False, description="Serve the eager model in fp32 even where the package has a faster format built."
    )
    trust_formats: bool = Field(
        False, description="Use the package's format `fastest` even where others built it, which runs their code."
    )
    threads: int = Field(1, ge=1, le=256, description="Threads of each process in the dense layers.")
    max_batch: int = Field(256, ge=1, description="Records scored together at most, unless one request has more.")
    max_wait_ms: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="How long the first request of a batch waits for others while nothing is scored.",
    )
    max_queue: int = Field(4096, ge=1, description="Records of a process that may wait; a request beyond gets a 503.")
    max_delay_ms: float = Field(
        500.0, gt=0, description="A request that has waited longer, or will by all appearances, gets a 503."
    )
    max_requests: int = Field(512, ge=1, description="Requests of a process under way at once; beyond, a 503.")
    max_body_bytes: int = Field(1 << 20, ge=1024, description="Size of a request's body at most; beyond, a 413.")
    max_bag_ids: int = Field(
        16384, ge=1, description="Ids of one record in one multi-hot column at most; beyond, a 413."
    )
    max_connections: int = Field(
        1024, ge=2, description="Connections of a process at most: the one that is idle longest makes room, else a 503."
    )
    head_timeout_s: float = Field(
        10.0, gt=0, description="A connection whose first request, or the rest of its head, takes longer is closed."
    )
    body_timeout_s: float = Field(10.0, gt=0, description="A body that takes longer to arrive gets a 408.")
    send_timeout_s: float = Field(
        10.0, gt=0, description="A client that takes longer to receive its answer is cut off."
    )
    stall_timeout_s: float = Field(
        30.0, gt=0, description="If a batch is scored for longer, /healthz says 503 and requests are refused."
    )
    drain_s: float = Field(
        1.0, ge=0, description="After SIGTERM: how long /readyz says no before the port is closed, for load balancers."
    )
    stop_timeout_s: float = Field(25.0, gt=0, description="After SIGTERM: requests still open then are cut off.")
    watch_s: float | None = Field(
        None, gt=0, description="Look this often whether the link leads elsewhere, as if told by SIGHUP."
    )

    @model_validator(mode="after")
    def _check_together(self) -> ServeOptions:
        if self.exact and self.trust_formats:
            raise ValueError("--exact uses no format, so there is none to trust: leave out --trust-formats or --exact")
        if self.max_batch > self.max_queue:
            raise ValueError(f"max_queue ({self.max_queue}) must be at least max_batch ({self.max_batch})")
        if self.max_connections <= self.max_requests:
            raise ValueError(
                f"max_connections ({self.max_connections}) must be more than max_requests ({self.max_requests}), or "
                "nobody could ask for /healthz while all requests are under way"
            )
        return self
