"""What the parts alone do not show: fixed times of a step, fitted to whole steps beside what the parts predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from papilio.sharding.calibration.fit import fit_robust
from papilio.sharding.hardware import KERNELS, KernelRates

OVERHEADS = (
    "step_s",
    "sample_s",
    "group_s",
    "row_group_s",
    "table_s",
    "id_s",
    "bag_s",
    "pooled_value_s",
    "bucketize_id_s",
    "second_stage_value_s",
    "replica_value_s",
)
_KERNEL_FIELDS = tuple(field.name for field in fields(KernelRates))
# Parts of a step that may take longer, or less long, in its midst than alone, and the figures that are stretched then.
PARTS: Mapping[str, tuple[str, ...]] = {
    "lookup": tuple(f"lookup_{name}" for name in _KERNEL_FIELDS),
    "update": tuple(f"{kernel}_{name}" for kernel in KERNELS if kernel != "lookup" for name in _KERNEL_FIELDS),
    "latency": ("all_to_all_latency_s", "inter_host_latency_s"),
    "all_to_all": ("all_to_all_bytes_per_s",),
    "row_sums": ("reduce_scatter_bytes_per_s", "all_gather_bytes_per_s"),
    "dense": (
        "matmul_fp32_flops_per_s",
        "matmul_bf16_flops_per_s",
        "layer_s",
        "activation_bytes_per_s",
        "interaction_flops_per_s",
        "interaction_bytes_per_s",
    ),
    "all_reduce": ("all_reduce_bytes_per_s", "all_reduce_latency_s"),
    "dense_update": ("optimizer_bytes_per_s",),
}
# A part twice as long as alone counts as much as a step that is wrong by this.
STRETCH_WEIGHT = 0.1
LEAST_STRETCH = 0.2
# What costs nothing, as near as matters.
FREE_RATE = 1e18


@dataclass(frozen=True)
class StepTiming:
    """A measured step.

    Attributes:
        seconds: measured.
        parts: seconds that each of PARTS has of the prediction with every overhead at 0.
        overheads: how much each overhead adds to the prediction for each second that it has.
    """

    seconds: float
    parts: Mapping[str, float]
    overheads: Mapping[str, float]


def time_step(
    seconds: float, figures: Mapping[str, float], predict: Callable[[Mapping[str, float]], float]
) -> StepTiming:
    """Take a measured step apart: a part is what the prediction loses when the part's figures cost nothing.

    Args:
        seconds: measured.
        figures: with every overhead at 0.
        predict: seconds of the step with some figures.
    """
    alone_s = predict(figures)
    parts = {part: alone_s - predict({**figures, **_free(figures, names)}) for part, names in PARTS.items()}
    overheads = {name: predict({**figures, name: 1.0}) - alone_s for name in OVERHEADS}
    return StepTiming(seconds, parts, overheads)


def fit_overheads(timings: Sequence[StepTiming], figures: Mapping[str, float]) -> dict[str, float]:
    """Return the figures with overheads, and with the parts stretched to what they take in the midst of a step."""
    terms = np.array(
        [
            [*(timing.parts[part] for part in PARTS), *(timing.overheads[name] for name in OVERHEADS)]
            for timing in timings
        ]
    )
    prior = np.array([1.0] * len(PARTS) + [np.nan] * len(OVERHEADS))
    measured = np.array([timing.seconds for timing in timings])
    values = fit_robust(terms, measured, prior, STRETCH_WEIGHT).tolist()
    fitted = dict(figures)
    for part, stretch in zip(PARTS, values, strict=False):
        _stretch(fitted, PARTS[part], max(stretch, LEAST_STRETCH))
    fitted.update(zip(OVERHEADS, values[len(PARTS) :], strict=True))
    return fitted


def _free(figures: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    return {name: FREE_RATE if name.endswith("_per_s") else 0.0 for name in names if name in figures}


def _stretch(figures: dict[str, float], names: Sequence[str], factor: float) -> None:
    for name in names:
        if name in figures:
            figures[name] *= 1 / factor if name.endswith("_per_s") else factor
