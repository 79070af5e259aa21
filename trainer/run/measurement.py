"""What a step really takes, compared with what the plan predicted: seconds by windows of steps, bytes by rank."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from papilio.sharding.plan_file import PlanFile
from papilio.trainer.process_group import Ranks


class StepMeter:
    """Measures a run's training steps: call `close_window` now and then, evaluation not counted in its seconds."""

    def __init__(self, step: int = 0, train_s: float = 0.0) -> None:
        """Begin after `step` steps and `train_s` seconds of training."""
        self._windows_s: list[float] = []
        self._latest = (step, train_s)
        self.memory_bytes = 0

    def close_window(self, step: int, train_s: float, *, device: torch.device, has_only_trained: bool) -> None:
        """End a window of steps.

        Args:
            step: steps so far.
            train_s: seconds of training so far.
            device: where the model is.
            has_only_trained: no evaluation has been run yet, whose larger batches would stay in a CPU's heap.
        """
        steps, seconds = step - self._latest[0], train_s - self._latest[1]
        if steps:
            self._windows_s.append(seconds / steps)
        self._latest = (step, train_s)
        if has_only_trained:
            self.memory_bytes = max(self.memory_bytes, process_memory_bytes(device))

    @property
    def step_s(self) -> float | None:
        """Median over the windows; the first one, which warms up, counts only where there is no other."""
        windows = self._windows_s[1:] or self._windows_s
        return statistics.median(windows) if windows else None


@dataclass(frozen=True)
class Comparison:
    """Predicted against measured; bytes are of the rank that needed most."""

    hardware: str
    predicted_step_s: float
    measured_step_s: float
    predicted_bytes: int
    measured_bytes: int
    rank: int

    @property
    def step_error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_step_s / self.measured_step_s - 1

    @property
    def memory_error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_bytes / self.measured_bytes - 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**self.__dict__, "step_error": self.step_error, "memory_error": self.memory_error}


def compare(plan: PlanFile, meter: StepMeter, ranks: Ranks) -> Comparison | None:
    """Compare the plan's prediction with the measurement; None where too little was measured. Collective."""
    found: list[tuple[float | None, int]] = [(None, 0)] * ranks.world_size
    dist.all_gather_object(found, (meter.step_s, meter.memory_bytes), group=ranks.group)
    seconds = [step_s for step_s, _ in found if step_s is not None]
    measured = [memory_bytes for _, memory_bytes in found]
    if len(seconds) < len(found) or min(measured) == 0:
        return None
    rank = max(range(len(measured)), key=measured.__getitem__)
    return Comparison(
        hardware=plan.machine.hardware,
        predicted_step_s=plan.step.total_s,
        measured_step_s=statistics.median(seconds),
        predicted_bytes=plan.ranks[rank % len(plan.ranks)].memory.device_bytes,
        measured_bytes=measured[rank],
        rank=rank,
    )


def process_memory_bytes(device: torch.device) -> int:
    """Return the memory that this rank holds: reserved on its GPU, or anonymous pages of its process.

    Mapped files (libraries, shards of data) are left out: the system can take those back. On a CPU the heap keeps what
    a step once needed (trainer/runtime.py), so between steps it shows the peak. 0 where the system does not tell.
    """
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        return int(total_bytes - free_bytes)
    if sys.platform != "linux":
        return 0
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
