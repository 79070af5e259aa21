"""Measured figures as a hardware profile, and a profile as a TOML file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from papilio.sharding.hardware import UNITS, Figure, Hardware, HardwareError, RatesEntry, load_hardware

SOURCE = "papilio calibrate"
# Units to choose from, by how a figure's name ends; the largest that leaves a value of 1 or more.
_UNIT_CHOICES = {
    "flops_per_s": ("TFLOP/s", "GFLOP/s"),
    "bytes_per_s": ("TB/s", "GB/s", "MB/s"),
    "_s": ("s", "ms", "us", "ns"),
}


def hardware_from_values(
    device_type: str, ranks_per_host: int, values: Mapping[str, float], framework_bytes: float
) -> Hardware:
    """Describe this machine with rates measured while so many ranks were busy.

    Args:
        device_type: "cpu" or "cuda".
        ranks_per_host: busy ranks.
        values: figures in bytes, seconds, operations or per second.
        framework_bytes: memory of a rank's process before it has any tensor.
    """
    host_bytes = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    on_gpu = device_type == "cuda"
    device_bytes = float(torch.cuda.get_device_properties(0).total_memory) if on_gpu else host_bytes
    processor = torch.cuda.get_device_name(0) if on_gpu else platform.processor() or platform.machine()
    return Hardware(
        name="this_machine",
        description=f"{processor}, {os.cpu_count()} cores, torch {torch.__version__}",
        device="cuda" if on_gpu else "cpu",
        ranks_per_host=torch.cuda.device_count() if on_gpu else ranks_per_host,
        device_memory=_figure(device_bytes, "GiB"),
        host_memory=_figure(host_bytes, "GiB"),
        framework_memory=_figure(framework_bytes, "MiB"),
        host_cores=_figure(float(os.cpu_count() or 1), "1"),
        rates=(RatesEntry(ranks_per_host=ranks_per_host, figures={n: _named_figure(n, v) for n, v in values.items()}),),
    )


def add_rates(path: str, measured: Hardware) -> Hardware:
    """Return the profile in the file, where there is one of this device, with the measured rates added or replaced."""
    if not Path(path).is_file():
        return measured
    before = load_hardware(path)
    if before.device != measured.device:
        raise HardwareError(f"{path} describes a {before.device} machine; give --output another file")
    new = {entry.ranks_per_host for entry in measured.rates}
    entries = [entry for entry in before.rates if entry.ranks_per_host not in new] + list(measured.rates)
    rates = tuple(sorted(entries, key=lambda entry: entry.ranks_per_host))
    update = {"rates": rates, "ranks_per_host": _usual_ranks(measured, rates), "host_cores": measured.host_cores}
    return before.model_copy(update=update)


def _usual_ranks(measured: Hardware, rates: tuple[RatesEntry, ...]) -> int:
    """One a GPU; on a CPU the most that were measured of those that had a core each."""
    if measured.device == "cuda" or measured.host_cores is None:
        return measured.ranks_per_host
    counts = [entry.ranks_per_host for entry in rates]
    return max((count for count in counts if count <= measured.host_cores.si), default=min(counts))


def write_hardware(hardware: Hardware, path: str) -> None:
    """Write a profile, whole or not at all."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(to_toml(hardware), "utf-8")
    part.replace(path)


def to_toml(hardware: Hardware) -> str:
    """Return the text of a profile, which `load_hardware` reads."""
    lines = [f"format_version = {hardware.format_version}"]
    lines += [f"{name} = {json.dumps(getattr(hardware, name))}" for name in ("name", "description", "device")]
    lines.append(f"ranks_per_host = {hardware.ranks_per_host}")
    for name in ("device_memory", "host_memory", "framework_memory", "host_cores"):
        if (figure := getattr(hardware, name)) is not None:
            lines.append(f"{name} = {_inline(figure)}")
    for entry in hardware.rates:
        lines += ["", "[[rates]]", f"ranks_per_host = {entry.ranks_per_host}", "", "[rates.figures]"]
        lines += [f"{name} = {_inline(figure)}" for name, figure in entry.figures.items()]
        if entry.achieved:
            lines += ["", "[rates.achieved]"]
            lines += [f"{name} = {_inline(share)}" for name, share in entry.achieved.items()]
    return "\n".join(lines) + "\n"


def _inline(figure: Figure) -> str:
    fields = {"value": f"{figure.value!r}", **{k: json.dumps(getattr(figure, k)) for k in ("unit", "source", "date")}}
    return "{ " + ", ".join(f"{name} = {value}" for name, value in fields.items()) + " }"


def _named_figure(name: str, value: float) -> Figure:
    if name == "overlap":
        return _figure(value, "1")
    choices = next(units for ending, units in _UNIT_CHOICES.items() if name.endswith(ending))
    return _figure(value, next((unit for unit in choices if value >= UNITS[unit]), choices[-1]))


def _figure(value: float, unit: str) -> Figure:
    rounded = float(f"{value / UNITS[unit]:.5g}")
    return Figure(value=rounded, unit=unit, source=SOURCE, date=f"{datetime.now(UTC):%Y-%m-%d}")
