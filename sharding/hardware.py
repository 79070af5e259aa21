"""Hardware as the planner sees it: capacities and rates, each with unit, source and date, read from a TOML file.

Profiles of known machines lie in sharding/profiles; `papilio calibrate` measures the machine it runs on and writes a
file of the same form. No torch is imported here.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

FORMAT_VERSION = 1
PROFILES = Path(__file__).with_name("profiles")
# What a unit is in bytes, seconds, operations or items.
UNITS = {
    **{"B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40},
    **{"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
    **{"B/s": 1.0, "MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12},
    **{"FLOP/s": 1.0, "GFLOP/s": 1e9, "TFLOP/s": 1e12},
    **{"1": 1.0},
}


class HardwareError(ValueError):
    """A hardware profile that does not exist or cannot be used; the message names the file, the key and the mend."""


@dataclass(frozen=True)
class Rates:
    """What one rank can do while all ranks of its host are busy, in bytes, seconds and floating-point operations.

    The time of an operation is a fixed part plus its size over a rate; `sharding/planning/cost.py` has the formulas.

    Attributes:
        matmul_fp32_flops_per_s: matrix products in fp32, as achieved at the sizes of MLPs.
        matmul_bf16_flops_per_s: the same in bf16.
        memory_bytes_per_s: streaming reads and writes of the rank's own memory (a GPU's, or the host's for CPU ranks).
        host_memory_bytes_per_s: the host's memory read by this rank over its link (UVM); 0 where there is no UVM.
        lookup_row_s: fixed time of a row looked up.
        lookup_bytes_per_s: rate at which random rows are read, pooled and written.
        update_row_s: fixed time of a row updated by the fused optimizer.
        update_bytes_per_s: rate at which gradients are read and rows updated.
        all_to_all_latency_s: fixed time of an all-to-all, reduce-scatter or all-gather inside a host.
        all_to_all_bytes_per_s: bytes that one rank sends to ranks of its own host.
        inter_host_latency_s: fixed time of a collective that spans hosts.
        inter_host_bytes_per_s: bytes that one rank sends to ranks of other hosts while all ranks of its host send.
        all_reduce_bytes_per_s: bus bandwidth of an all-reduce inside a host (2 (n - 1) / n times the bytes reduced).
        layer_s: fixed time of one dense operator, forward and backward.
        step_s: fixed time of a step: batch, loss, bookkeeping.
        group_s: fixed time of each sharding group (tables of one type and pooling form one) in a step.
        table_s: fixed time of each table on a rank in a step.
        id_s: time of each id of a rank's samples in the input distribution.
        overlap: share of communication that other work hides (0: strictly one after the other).
    """

    matmul_fp32_flops_per_s: float
    matmul_bf16_flops_per_s: float
    memory_bytes_per_s: float
    host_memory_bytes_per_s: float
    lookup_row_s: float
    lookup_bytes_per_s: float
    update_row_s: float
    update_bytes_per_s: float
    all_to_all_latency_s: float
    all_to_all_bytes_per_s: float
    inter_host_latency_s: float
    inter_host_bytes_per_s: float
    all_reduce_bytes_per_s: float
    layer_s: float
    step_s: float
    group_s: float
    table_s: float
    id_s: float
    overlap: float


RATE_NAMES = tuple(field.name for field in fields(Rates))


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(_Section):
    """A number with its unit, and where it comes from."""

    value: float = Field(ge=0)
    unit: str
    source: str = Field(min_length=3)
    date: str = Field(pattern=r"^\d{4}(-\d{2}(-\d{2})?)?$", description="Of the source or the measurement.")

    @property
    def si(self) -> float:
        """The value in bytes, seconds, operations, or per second."""
        return self.value * UNITS[self.unit]


class RatesEntry(_Section):
    """Rates with so many busy ranks on a host."""

    ranks_per_host: int = Field(ge=1)
    figures: dict[str, Figure]


class Hardware(_Section):
    """One kind of host.

    Attributes:
        device: where tables and dense part live.
        ranks_per_host: ranks of a host where nothing else is asked for: one a GPU.
        device_memory: of one rank's device; for a CPU host the whole host's, which its ranks share.
        host_memory: of a whole host.
        framework_memory: what a rank's process uses before any tensor of the model is there: CUDA context, NCCL
            buffers, or on a CPU the libraries.
    """

    format_version: int = FORMAT_VERSION
    name: str
    description: str
    device: Literal["cpu", "cuda"]
    ranks_per_host: int = Field(ge=1)
    device_memory: Figure
    host_memory: Figure
    framework_memory: Figure
    rates: tuple[RatesEntry, ...] = Field(min_length=1)

    def rates_of(self, ranks_per_host: int) -> Rates:
        """Return the rates of the entry with the nearest number of busy ranks a host."""
        entry = min(self.rates, key=lambda entry: (abs(entry.ranks_per_host - ranks_per_host), entry.ranks_per_host))
        return Rates(**{name: entry.figures[name].si for name in RATE_NAMES})

    def device_memory_bytes(self, ranks_per_host: int) -> int:
        """Return the memory of one rank's device; ranks of a CPU host share the host's evenly."""
        capacity = self.device_memory.si
        return int(capacity / ranks_per_host if self.device == "cpu" else capacity)


def profile_names() -> list[str]:
    """Names of the profiles that come with Papilio."""
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def load_hardware(name_or_path: str) -> Hardware:
    """Read a profile by its name, or a file by its path.

    Raises:
        HardwareError: there is none, a figure is missing, unknown or without a known unit, or the version is another.
    """
    path = Path(name_or_path)
    if not path.suffix:
        path = PROFILES / f"{name_or_path}.toml"
    if not path.is_file():
        nearest = difflib.get_close_matches(name_or_path, profile_names(), n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise HardwareError(
            f"hardware {name_or_path}: no such profile or file; {hint}profiles: {', '.join(profile_names())}; "
            "`papilio calibrate --output my_machine.toml` measures the machine it runs on"
        )
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise HardwareError(f"hardware {path}: not a TOML file ({error})") from None
    version = tree.get("format_version")
    if version != FORMAT_VERSION:
        raise HardwareError(
            f"hardware {path} has format version {version}; this Papilio reads {FORMAT_VERSION}: calibrate again, or "
            "use the Papilio that wrote it"
        )
    try:
        hardware = Hardware.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise HardwareError(f"hardware {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    _check_figures(hardware, path)
    return hardware


def _check_figures(hardware: Hardware, path: Path) -> None:
    for entry in hardware.rates:
        missing, unknown = set(RATE_NAMES) - set(entry.figures), set(entry.figures) - set(RATE_NAMES)
        if missing or unknown:
            wrong = [*(f"{name} is missing" for name in sorted(missing)), *(f"{name} is unknown" for name in unknown)]
            raise HardwareError(f"hardware {path}: rates of {entry.ranks_per_host} ranks a host: {'; '.join(wrong)}")
    figures = {"device_memory": hardware.device_memory, "host_memory": hardware.host_memory}
    figures["framework_memory"] = hardware.framework_memory
    for entry in hardware.rates:
        figures |= entry.figures
    for name, figure in figures.items():
        if figure.unit not in UNITS:
            raise HardwareError(f"hardware {path}: {name} has unit {figure.unit!r}; units: {', '.join(UNITS)}")
