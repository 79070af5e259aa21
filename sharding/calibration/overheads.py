"""What the parts alone do not show: fixed times of a step, fitted to whole steps beside what the parts predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from sharding.calibration.fit import fit_relative
from sharding.hardware import KERNELS, KernelRates
from sharding.plan_file import StepPrediction

OVERHEADS = ("step_s", "sample_s", "group_s", "row_group_s", "table_s", "id_s", "bag_s", "bucketize_id_s")
# Parts of a step that may take longer, or less long, in its midst than alone: by name, what of a prediction they are,
# and the figures that are stretched.
PARTS: Mapping[str, Callable[[StepPrediction], float]] = {
    "kernels": lambda step: step.phases.lookup_s + step.phases.update_s,
    "exchange": lambda step: step.phases.input_dist_s + step.phases.output_dist_s + step.phases.gradient_dist_s,
    "dense": lambda step: step.dense_s,
    "dense_update": lambda step: step.all_reduce_s + step.dense_optimizer_s,
}
FIGURES = {
    "kernels": tuple(f"{kernel}_{field.name}" for kernel in KERNELS for field in fields(KernelRates)),
    "exchange": ("all_to_all_bytes_per_s", "reduce_scatter_bytes_per_s", "all_gather_bytes_per_s"),
    "dense": (
        "matmul_fp32_flops_per_s",
        "matmul_bf16_flops_per_s",
        "layer_s",
        "activation_bytes_per_s",
        "interaction_flops_per_s",
        "interaction_bytes_per_s",
    ),
    "dense_update": ("all_reduce_bytes_per_s", "all_reduce_latency_s", "optimizer_bytes_per_s"),
}
# A part twice as long as alone counts as much as a step that is wrong by this.
STRETCH_WEIGHT = 0.2


@dataclass(frozen=True)
class StepTiming:
    """A measured step.

    Attributes:
        seconds: measured.
        alone: predicted with every overhead at 0.
        overheads: how much each overhead adds to the prediction for each second that it has.
    """

    seconds: float
    alone: StepPrediction
    overheads: Mapping[str, float]


def fit_overheads(timings: Sequence[StepTiming], figures: Mapping[str, float]) -> dict[str, float]:
    """Return the figures with overheads, and with the parts stretched to what they take in the midst of a step."""
    terms = np.array(
        [
            [*(part(timing.alone) for part in PARTS.values()), *(timing.overheads[name] for name in OVERHEADS)]
            for timing in timings
        ]
    )
    # Latencies of collectives, which are in none of the parts.
    rest = np.array([timing.alone.total_s for timing in timings]) - terms[:, : len(PARTS)].sum(axis=1)
    measured = np.array([timing.seconds for timing in timings])
    terms = np.hstack([terms, rest[:, None]])
    prior = np.array([1.0] * len(PARTS) + [np.nan] * len(OVERHEADS) + [1.0])
    values = fit_relative(terms, measured, prior, STRETCH_WEIGHT).tolist()
    fitted = dict(figures)
    for name, stretch in zip(PARTS, values, strict=False):
        _stretch(fitted, FIGURES[name], max(stretch, 0.05))
    _stretch(fitted, ("all_to_all_latency_s", "inter_host_latency_s"), values[-1])
    fitted.update(zip(OVERHEADS, values[len(PARTS) :], strict=False))
    return fitted


def _stretch(figures: dict[str, float], names: Sequence[str], factor: float) -> None:
    for name in names:
        if name in figures:
            figures[name] *= 1 / factor if name.endswith("_per_s") else factor
