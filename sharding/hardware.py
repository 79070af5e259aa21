"""Hardware as the planner sees it: capacities and rates, each with unit, source and date, read from a TOML file.

Profiles of known machines lie in sharding/profiles; `papilio calibrate` measures the machine it runs on and writes a
file of the same form. No torch is imported here.
"""

from __future__ import annotations

import difflib
import itertools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

FORMAT_VERSION = 1
PROFILES = Path(__file__).with_name("profiles")
# What a unit is in bytes, seconds, operations or items, by what it measures.
UNITS_OF = {
    "bytes": {"B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40},
    "seconds": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
    "bytes per second": {"B/s": 1.0, "MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12},
    "operations per second": {"FLOP/s": 1.0, "GFLOP/s": 1e9, "TFLOP/s": 1e12},
    "a number": {"1": 1.0},
}
UNITS = {name: factor for units in UNITS_OF.values() for name, factor in units.items()}


class HardwareError(ValueError):
    """A hardware profile that does not exist or cannot be used; the message names the file, the key and the fix."""


# Table sizes at which the rate of rows touched for the first time in a step is stated; between them it is interpolated.
TOUCH_SIZES = {"1mib": 1 << 20, "32mib": 32 << 20, "1gib": 1 << 30}
NEAREST_TOUCHED_BYTES = 64  # a row that is not in the cache costs its own lines and about one more


@dataclass(frozen=True)
class KernelRates:
    """What looking rows up, or updating them, costs. A rate of 0 stands for no cost at all.

    Attributes:
        row_s: each id.
        bytes_per_s: each byte of the rows that ids ask for, and of pooled vectors.
        bag_s: each bag.
        touch_1mib_bytes_per_s: besides that, each byte of the rows asked for, once however often, and of their
            optimizer state, when the table has 1 MiB: the caches are cold by the next step.
        touch_32mib_bytes_per_s: the same for a table of 32 MiB.
        touch_1gib_bytes_per_s: the same for a table of 1 GiB or more.
    """

    row_s: float
    bytes_per_s: float
    bag_s: float = 0.0
    touch_1mib_bytes_per_s: float = 0.0
    touch_32mib_bytes_per_s: float = 0.0
    touch_1gib_bytes_per_s: float = 0.0

    def touch_s_per_byte(self, table_bytes: float) -> float:
        """Seconds for each byte touched for the first time, interpolated over the logarithm of the table's size."""
        knots = [
            (size, 1 / rate if (rate := getattr(self, f"touch_{name}_bytes_per_s")) else 0.0)
            for name, size in TOUCH_SIZES.items()
        ]
        if table_bytes <= knots[0][0]:
            return knots[0][1] * table_bytes / knots[0][0]
        for (low, low_s), (high, high_s) in itertools.pairwise(knots):
            if table_bytes <= high:
                return low_s + (high_s - low_s) * math.log(table_bytes / low) / math.log(high / low)
        return knots[-1][1]


@dataclass(frozen=True)
class Rates:
    """What one rank can do while all ranks of its host are busy, in bytes, seconds and floating-point operations.

    The time of an operation is a fixed part plus its size over a rate; `sharding/planner/cost.py` has the formulas.
    Figures with a default may be left out of a profile.

    Attributes:
        matmul_fp32_flops_per_s: matrix products in fp32, as achieved at the sizes of MLPs.
        matmul_bf16_flops_per_s: the same in bf16.
        memory_bytes_per_s: streaming reads and writes of the rank's own memory (a GPU's, or the host's for CPU ranks).
        host_memory_bytes_per_s: the host's memory read by this rank over its link (UVM); 0 where there is no UVM.
        lookup: rows read and pooled; figures `lookup_...`.
        updates: rows updated, by sparse optimizer; "" for all that are not named; figures `update_...` and
            `update_<optimizer>_...`.
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
        reduce_scatter_bytes_per_s: as all_to_all_bytes_per_s, of a reduce-scatter (0: the same).
        all_gather_bytes_per_s: as all_to_all_bytes_per_s, of an all-gather (0: the same).
        interaction_flops_per_s: the many small products of a dot interaction (0: as other matrix products).
        interaction_bytes_per_s: the vectors and products of an interaction, copied and picked (0: as memory).
        activation_bytes_per_s: outputs of layers written, read and their gradients (0: as memory).
        optimizer_bytes_per_s: dense weights, gradients and state read and written (0: as memory).
        bag_s: time of each bag of a rank's samples in the input distribution.
        pooled_value_s: time of each pooled value between tables and dense part, and of its gradient.
        bucketize_id_s: time of each id that is sorted by row shard, besides id_s.
        second_stage_value_s: time of each value that table_row_wise and grid_shard send on from host to host (and on a
            single host to itself), and of its gradient.
        replica_value_s: time of each weight of a data_parallel table, besides the passes of the optimizer: its gradient
            is cleared, and copied for the all-reduce and back.
        row_group_s: fixed time of a row-wise group, besides group_s.
        all_reduce_latency_s: fixed time of an all-reduce inside a host.
        sample_s: time of each sample of a rank: batch, loss, bookkeeping.
    """

    matmul_fp32_flops_per_s: float
    matmul_bf16_flops_per_s: float
    memory_bytes_per_s: float
    host_memory_bytes_per_s: float
    lookup: KernelRates
    updates: Mapping[str, KernelRates]
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
    reduce_scatter_bytes_per_s: float = 0.0
    all_gather_bytes_per_s: float = 0.0
    interaction_flops_per_s: float = 0.0
    interaction_bytes_per_s: float = 0.0
    activation_bytes_per_s: float = 0.0
    optimizer_bytes_per_s: float = 0.0
    bag_s: float = 0.0
    pooled_value_s: float = 0.0
    bucketize_id_s: float = 0.0
    second_stage_value_s: float = 0.0
    replica_value_s: float = 0.0
    row_group_s: float = 0.0
    all_reduce_latency_s: float = 0.0
    sample_s: float = 0.0

    def update(self, sparse_optimizer: str) -> KernelRates:
        """Return what updating rows costs with an optimizer."""
        return self.updates.get(sparse_optimizer, self.updates[""])


def free_rates(**figures: float) -> Rates:
    """Return rates with which nothing costs anything but what is given."""
    values = {field.name: math.inf if field.name.endswith("_per_s") else 0.0 for field in fields(Rates)}
    free = KernelRates(0.0, math.inf)
    return Rates(**{**values, "lookup": free, "updates": {"": free}, **figures})  # type: ignore[arg-type]


# Optimizers whose update may have figures of its own; the others take those of `update_...`.
MEASURED_OPTIMIZERS = ("sgd", "rowwise_adagrad", "adagrad")
KERNELS = ("lookup", "update", *(f"update_{name}" for name in MEASURED_OPTIMIZERS))


def _figure_names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the figures that a profile must have, and of those that it may have."""
    required = [field.name for field in fields(Rates) if field.default is MISSING]
    optional = [field.name for field in fields(Rates) if field.default is not MISSING]
    for kernel in KERNELS:
        for field in fields(KernelRates):
            is_required = field.default is MISSING and kernel in ("lookup", "update")
            (required if is_required else optional).append(f"{kernel}_{field.name}")
    return tuple(name for name in required if name not in ("lookup", "updates")), tuple(optional)


RATE_NAMES, OPTIONAL_RATE_NAMES = _figure_names()


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(_Section):
    """A number with its unit, and where it comes from."""

    value: float = Field(ge=0, allow_inf_nan=False)
    unit: str
    source: str = Field(min_length=3)
    date: str = Field(pattern=r"^\d{4}(-\d{2}(-\d{2})?)?$", description="Of the source or the measurement.")

    @property
    def si(self) -> float:
        """The value in bytes, seconds, operations, or per second."""
        return self.value * UNITS[self.unit]


class RatesEntry(_Section):
    """Rates with so many busy ranks on a host.

    Attributes:
        figures: the rates by name; of a machine that was measured what it reaches, else the peak of its data sheet.
        achieved: shares of peak figures that programs reach.
    """

    ranks_per_host: int = Field(ge=1)
    figures: dict[str, Figure]
    achieved: dict[str, Figure] = Field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """What is reached, by name, in bytes, seconds, operations or per second."""
        shares = {name: share.si for name, share in self.achieved.items()}
        return {name: figure.si * shares.get(name, 1.0) for name, figure in self.figures.items()}


class Hardware(_Section):
    """One kind of host.

    Attributes:
        device: where tables and dense part live.
        ranks_per_host: ranks of a host where nothing else is asked for: one a GPU.
        device_memory: of one rank's device; for a CPU host the whole host's, which its ranks share.
        host_memory: of a whole host.
        host_cores: cores of a whole host, which a job asks for; older files have none.
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
    host_cores: Figure | None = None
    rates: tuple[RatesEntry, ...] = Field(min_length=1)

    def rates_of(self, ranks_per_host: int) -> Rates:
        """Return the rates of the entry with the nearest number of busy ranks a host."""
        entry = min(self.rates, key=lambda entry: (abs(entry.ranks_per_host - ranks_per_host), entry.ranks_per_host))
        return rates_from(entry.values())

    @property
    def num_gpus(self) -> int:
        """GPUs of a host."""
        return self.ranks_per_host if self.device == "cuda" else 0

    def capacities(self) -> dict[str, Figure]:
        """Return the figures that are no rates, by name."""
        figures = {name: getattr(self, name) for name in ("device_memory", "host_memory", "framework_memory")}
        return figures | ({"host_cores": self.host_cores} if self.host_cores is not None else {})

    def device_memory_bytes(self, ranks_per_host: int) -> int:
        """Return the memory of one rank's device; ranks of a CPU host share the host's evenly."""
        capacity = self.device_memory.si
        return int(capacity / ranks_per_host if self.device == "cpu" else capacity)


def rates_from(values: Mapping[str, float]) -> Rates:
    """Put figures, by name and in bytes, seconds, operations or per second, into their places."""
    plain = {field.name: values[field.name] for field in fields(Rates) if field.name in values}
    kernels = {
        kernel: KernelRates(**{field.name: values[f"{kernel}_{field.name}"] for field in present})
        for kernel in KERNELS
        if (present := [field for field in fields(KernelRates) if f"{kernel}_{field.name}" in values])
    }
    updates = {name: kernels[f"update_{name}"] for name in MEASURED_OPTIMIZERS if f"update_{name}" in kernels}
    return Rates(lookup=kernels["lookup"], updates={"": kernels["update"], **updates}, **plain)


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
    except RecursionError:
        raise HardwareError(f"hardware {path}: not a hardware file (nested too deep)") from None
    except OSError as error:
        raise HardwareError(f"hardware {path}: cannot be read ({error.strerror})") from None
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
    """Check names, units and ranges of all figures.

    Raises:
        HardwareError: the first that is wrong, with what is allowed.
    """
    for name, figure in hardware.capacities().items():
        _check_figure(f"hardware {path}: {name}", name, figure)
    for entry in hardware.rates:
        where = f"hardware {path}: rates of {entry.ranks_per_host} ranks a host"
        missing = set(RATE_NAMES) - set(entry.figures)
        unknown = set(entry.figures) - set(RATE_NAMES) - set(OPTIONAL_RATE_NAMES)
        if missing or unknown:
            wrong = [
                *(f"{name} is missing" for name in sorted(missing)),
                *(f"{name} is unknown" for name in sorted(unknown)),
            ]
            raise HardwareError(f"{where}: {'; '.join(wrong)}")
        for name in sorted(set(entry.achieved) - set(entry.figures)):
            raise HardwareError(f"hardware {path}: achieved.{name} is a share of no figure")
        for name, figure in entry.figures.items():
            _check_figure(f"{where}: {name}", name, figure)
        for name, figure in entry.achieved.items():
            _check_figure(f"{where}: achieved.{name}", f"achieved.{name}", figure)
    counts = [entry.ranks_per_host for entry in hardware.rates]
    for count in counts:
        if counts.count(count) > 1:
            raise HardwareError(f"hardware {path}: rates of {count} ranks a host are given twice; keep one of them")


def _check_figure(where: str, name: str, figure: Figure) -> None:
    kind = _kind_of(name)
    units = UNITS_OF[kind]
    if figure.unit not in units:
        raise HardwareError(f"{where} has unit {figure.unit!r}; it is {kind}: {', '.join(units)}")
    low, high = _bounds_of(name)
    if not low <= figure.si <= high or (low == 0 and figure.si == 0 and _must_be_positive(name)):
        least = "more than 0" if _must_be_positive(name) and low == 0 else f"at least {low:g}"
        most = f" and at most {high:g}" if high != math.inf else ""
        raise HardwareError(
            f"{where} is {figure.value:g} {figure.unit if figure.unit != '1' else ''}".rstrip()
            + (f"; it must be {least}{most}")
        )


def _kind_of(name: str) -> str:
    """Return what a figure measures: a key of UNITS_OF."""
    if name.startswith("achieved.") or name in ("overlap", "host_cores"):
        return "a number"
    endings = {"_memory": "bytes", "_bytes_per_s": "bytes per second", "_flops_per_s": "operations per second"}
    return next((kind for ending, kind in endings.items() if name.endswith(ending)), "seconds")


def _bounds_of(name: str) -> tuple[float, float]:
    if name.startswith("achieved.") or name == "overlap":
        return 0.0, 1.0
    return (1.0, math.inf) if name == "host_cores" else (0.0, math.inf)


def _must_be_positive(name: str) -> bool:
    """Whether 0 is no value: it would be a division by zero, or a machine without memory."""
    if name.startswith("achieved.") or name in ("device_memory", "host_memory"):
        return True
    # Without UVM there is no rate at which the host's memory is read; optional rates fall back where they are 0.
    return name.endswith("_per_s") and name in RATE_NAMES and name != "host_memory_bytes_per_s"
