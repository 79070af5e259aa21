"""What is installed and what machine this is: facts for `papilio doctor`, which judges them. Imports no torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata

from papilio.trainer.elastic.bootstrap import child_command

DISTRIBUTIONS = (
    "papilio",
    "torch",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "torchrec",
    "torchx-nightly",
    "torchx",
    "tensordict",
    "torchmetrics",
    "pyre-extensions",
    "tqdm",
    "numpy",
    "pyarrow",
    "pydantic",
    "iopath",
    "zstandard",
    "tensorboard",
)
PROBE_TIMEOUT_S = 180


@dataclass(frozen=True)
class Probe:
    """What a process of its own found when it loaded the version set; `error` is the last line it left when
    it failed."""

    torch_loads: bool = False
    torch_cuda: str | None = None
    num_visible_gpus: int = 0
    has_gloo: bool = False
    has_nccl: bool = False
    fbgemm_loads: bool = False
    torchrec_loads: bool = False
    missing_operators: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Installation:
    """The facts. `versions` has a version, or None, for each of DISTRIBUTIONS; `gpus` are the driver's lines."""

    python: tuple[int, int, int]
    versions: Mapping[str, str | None]
    probe: Probe
    gpus: tuple[str, ...]
    driver: str | None
    torchrun: str | None
    num_cores: int
    memory_bytes: int
    shared_memory_bytes: int
    bin_folder: str = field(default_factory=lambda: os.path.dirname(sys.executable))


def inspect_installation() -> Installation:
    """Gather the facts; takes some seconds, as a process of its own loads torch."""
    return Installation(
        python=(sys.version_info.major, sys.version_info.minor, sys.version_info.micro),
        versions={name: _version(name) for name in DISTRIBUTIONS},
        probe=run_probe(child_command("papilio.launch.doctor.fbgemm_probe")),
        gpus=_query_gpus("--list-gpus"),
        driver=next(iter(_query_gpus("--query-gpu=driver_version", "--format=csv,noheader")), None),
        torchrun=shutil.which("torchrun"),
        num_cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        shared_memory_bytes=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
    )


def run_probe(command: list[str]) -> Probe:
    """Run the probe and put together what it printed before it ended, well or not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Probe(error=f"loading torch, fbgemm and torchrec took more than {PROBE_TIMEOUT_S} s")
    facts: dict[str, object] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            facts.update(json.loads(line))
    if done.returncode:
        last_lines = done.stderr.strip().splitlines()[-1:]
        signal_note = [f"ended by signal {-done.returncode}"] if done.returncode < 0 else []
        facts["error"] = "; ".join([*signal_note, *last_lines]) or f"exit status {done.returncode}"
    facts["missing_operators"] = tuple(facts.get("missing_operators", ()))  # type: ignore[arg-type]
    return Probe(**facts)  # type: ignore[arg-type]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _query_gpus(*arguments: str) -> tuple[str, ...]:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line for line in done.stdout.splitlines() if line.strip())
