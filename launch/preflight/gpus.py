"""The GPUs of a host as its driver shows them."""

from __future__ import annotations

import subprocess

from papilio.launch.preflight.facts import Gpu

MIB = 1 << 20
TIMEOUT_S = 60
FIELDS = (
    "index",
    "name",
    "memory.total",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_slowdown",
    "temperature.gpu",
    "driver_version",
)


def query_gpus() -> tuple[tuple[Gpu, ...], str, str]:
    """Return the GPUs, the driver's version, and what went wrong; no GPU at all is no error."""
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except FileNotFoundError:
        return (), "", ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), "", f"nvidia-smi does not answer: {error}"
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        return (), "", f"nvidia-smi failed with status {done.returncode}: {' '.join(last)}"
    return read_gpus(done.stdout)


def read_gpus(listing: str) -> tuple[tuple[Gpu, ...], str, str]:
    """Read nvidia-smi's lines of FIELDS."""
    gpus, driver = [], ""
    for line in listing.splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) != len(FIELDS):
            return (), "", f"nvidia-smi says: {line}"
        index, name, total, used, errors, slowed, celsius, driver = words
        gpus.append(
            Gpu(
                index=int(index),
                name=name,
                memory_bytes=(_number(total) or 0) * MIB,
                used_bytes=(_number(used) or 0) * MIB,
                uncorrected_errors=_number(errors),
                is_slowed=slowed == "Active",
                celsius=_number(celsius),
            )
        )
    return tuple(gpus), driver, ""


def _number(word: str) -> int | None:
    """Read a number; the driver says "[N/A]" of what a GPU does not have."""
    return int(word) if word.isdigit() else None
