"""What a job asks of each host: cores, memory and GPUs, read from the file that the planner estimates with.

One file (sharding/profiles, or one that `papilio calibrate` wrote) describes a host to both, so that a job never asks
for other machines than its plan is made for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from papilio.launch.usage import UsageError
from papilio.sharding.hardware import Hardware, HardwareError, load_hardware

# What a job asks of a host's nominal memory; the operating system and the scheduler's daemons need the rest, and a
# scheduler refuses, or never starts, a job that asks for all. The plan leaves as much free (sharding.reserve_fraction).
JOB_MEMORY_SHARE = 0.9
MIB = 1 << 20
# Above these a number is a slip of the finger, and would make a manifest of millions of lines.
MAX_RANKS, MAX_CORES, MAX_HOSTS, MAX_RETRIES = 1_024, 100_000, 10_000, 10_000
MAX_MEMORY_MB, MAX_PORT, MAX_WAIT_S = 1 << 30, (1 << 16) - 1, 7 * 86_400
WHOLE_NUMBER = re.compile(r"[+-]?\d{1,18}", re.ASCII)
# Without a profile: enough for a recipe of the quick start's size.
DEFAULT_NUM_RANKS = 2
DEFAULT_MEMORY_MB = 4096


@dataclass(frozen=True)
class HostRequest:
    """What a job asks of each of its hosts; `hardware` is the profile's name or file, None where none was named."""

    nproc: int
    cpu: int
    gpu: int
    memory_mb: int
    hardware: str | None


def request_host(
    host: str | None,
    *,
    nproc: int | str | None = None,
    cpu: int | str | None = None,
    gpu: int | str | None = None,
    memory_mb: int | str | None = None,
    omp_threads: int = 1,
) -> HostRequest:
    """Fill in what was not said: from the profile `host`, or else from the number of ranks.

    Numbers may be text: TorchX does not convert the arguments of a component that may be None.

    Raises:
        UsageError: a number is none.
        HardwareError: there is no such profile, or the job asks for more than such a host has.
    """
    nproc, cpu, gpu, memory_mb = (
        _number(flag, value)
        for flag, value in (("--nproc", nproc), ("--cpu", cpu), ("--gpu", gpu), ("--memory_mb", memory_mb))
    )
    require_number("--omp_threads", omp_threads, 1, MAX_CORES)
    if nproc is not None:  # before cores are estimated from it
        require_number("--nproc", nproc, 1, MAX_RANKS)
    if host is None:
        nproc = DEFAULT_NUM_RANKS if nproc is None else nproc
        return HostRequest(
            nproc,
            nproc * omp_threads if cpu is None else cpu,
            0 if gpu is None else gpu,
            DEFAULT_MEMORY_MB if memory_mb is None else memory_mb,
            None,
        )
    hardware = load_hardware(host)
    nproc = hardware.ranks_per_host if nproc is None else nproc
    if gpu is None:
        gpu = nproc if hardware.device == "cuda" else 0
    host_mb = int(hardware.host_memory.si / MIB)
    request = HostRequest(
        nproc,
        _cores_of(hardware, host) if cpu is None else cpu,
        gpu,
        int(host_mb * JOB_MEMORY_SHARE) if memory_mb is None else memory_mb,
        str(Path(host).absolute()) if Path(host).suffix else host,
    )
    _check(request, hardware, host_mb)
    return request


def one_process(cpu: int, memory_mb: int) -> HostRequest:
    """Return what a job of one process asks for, which uses no GPU."""
    return HostRequest(1, cpu, 0, memory_mb, None)


def largest(flag: str, counts: Sequence[str] | None) -> int | None:
    """Return the largest of numbers that TorchX gives as text; None without any.

    Raises:
        UsageError: one is no number of at least 1.
    """
    numbers = [_number(flag, count) or 0 for count in counts or ()]
    for number in numbers:
        require_number(flag, number, 1, MAX_RANKS)
    return max(numbers, default=None)


def require_number(flag: str, value: float, least: float, most: float = float("inf")) -> None:
    """Check a number that a person gave; the one rule for all components and schedulers.

    Raises:
        UsageError: it is too small, too large, or none.
    """
    if not least <= value <= most:
        allowed = f"of at least {least:,}" if most == float("inf") else f"from {least:,} to {most:,}"
        raise UsageError(f"{flag} {value}: a number {allowed} is needed")


def check_request(request: HostRequest, omp_threads: int, max_retries: int) -> None:
    """Check what a job asks of each host, whoever filled it in.

    Raises:
        UsageError: a number is too small or too large.
    """
    require_number("--nproc", request.nproc, 1, MAX_RANKS)
    require_number("--cpu", request.cpu, 1, MAX_CORES)
    require_number("--gpu", request.gpu, 0, MAX_RANKS)
    require_number("--memory_mb", request.memory_mb, 1, MAX_MEMORY_MB)
    require_number("--omp_threads", omp_threads, 1, MAX_CORES)
    require_number("--max_retries", max_retries, 0, MAX_RETRIES)


def _number(flag: str, value: int | str | None) -> int | None:
    if value is None or isinstance(value, int):
        return value
    if not WHOLE_NUMBER.fullmatch(value):
        raise UsageError(f"{flag} {value}: a whole number is needed")
    return int(value)


def _cores_of(hardware: Hardware, host: str) -> int:
    if hardware.host_cores is None:
        raise HardwareError(
            f"hardware {host} does not say how many cores a host has: give --cpu, or add to the file a line like "
            'host_cores = { value = 32, unit = "1", source = "lscpu", date = "2026-11-21" }'
        )
    return int(hardware.host_cores.si)


def _check(request: HostRequest, hardware: Hardware, host_mb: int) -> None:
    if hardware.device == "cuda" and request.nproc > request.gpu:
        raise HardwareError(
            f"--nproc {request.nproc} with --gpu {request.gpu}: each rank needs a GPU of its own; leave --gpu out, or "
            f"make --nproc at most {request.gpu}"
        )
    for flag, asked, there in (
        ("--gpu" if request.gpu != request.nproc else "--nproc", request.gpu, hardware.num_gpus),
        ("--cpu", request.cpu, int(hardware.host_cores.si) if hardware.host_cores is not None else request.cpu),
        ("--memory_mb", request.memory_mb, host_mb),
    ):
        if asked > there:
            raise HardwareError(
                f"{flag} {asked}: a host {hardware.name} has {there}; ask for less, for more hosts (--nnodes), or name "
                "another --host"
            )
