"""Timings of the collectives that sharded tables and the dense part need, and the figures that follow."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from papilio.sharding.calibration.fit import fit_line

SIZES_BYTES = (16 << 10, 128 << 10, 1 << 20, 4 << 20, 16 << 20)
# A rate for what cannot be measured: one rank sends nothing.
UNLIMITED = 1e15


def measure_collectives(group: dist.ProcessGroup, device: torch.device, num_repeats: int) -> dict[str, float]:
    """Time each collective at some sizes and fit latencies and rates. Collective; the figures are rank 0's own."""
    world_size = dist.get_world_size(group)
    if world_size == 1:
        return {
            **dict.fromkeys(("all_to_all_latency_s", "all_reduce_latency_s", "inter_host_latency_s"), 0.0),
            **dict.fromkeys(
                ("all_to_all_bytes_per_s", "reduce_scatter_bytes_per_s", "all_gather_bytes_per_s"), UNLIMITED
            ),
            **dict.fromkeys(("all_reduce_bytes_per_s", "inter_host_bytes_per_s"), UNLIMITED),
        }
    sent = (world_size - 1) / world_size
    latency_s, all_to_all = _measure(_all_to_all, group, device, num_repeats, sent)
    _, reduce_scatter = _measure(_reduce_scatter, group, device, num_repeats, sent)
    _, all_gather = _measure(_all_gather, group, device, num_repeats, sent)
    reduce_latency_s, all_reduce = _measure(_all_reduce, group, device, num_repeats, 2 * sent)
    return {
        "all_to_all_latency_s": latency_s,
        "all_to_all_bytes_per_s": all_to_all,
        "reduce_scatter_bytes_per_s": reduce_scatter,
        "all_gather_bytes_per_s": all_gather,
        "all_reduce_latency_s": reduce_latency_s,
        "all_reduce_bytes_per_s": all_reduce,
        # There is one host only; another profile must say what lies between hosts.
        "inter_host_latency_s": latency_s,
        "inter_host_bytes_per_s": all_to_all,
    }


def _all_to_all(values: torch.Tensor, group: dist.ProcessGroup) -> None:
    dist.all_to_all_single(torch.empty_like(values), values, group=group)


def _reduce_scatter(values: torch.Tensor, group: dist.ProcessGroup) -> None:
    part = values.new_empty(values.numel() // dist.get_world_size(group))
    dist.reduce_scatter_tensor(part, values, group=group)


def _all_gather(values: torch.Tensor, group: dist.ProcessGroup) -> None:
    part = values[: values.numel() // dist.get_world_size(group)].clone()
    dist.all_gather_into_tensor(values, part, group=group)


def _all_reduce(values: torch.Tensor, group: dist.ProcessGroup) -> None:
    dist.all_reduce(values, group=group)


def _measure(
    collective: Callable[[torch.Tensor, dist.ProcessGroup], None],
    group: dist.ProcessGroup,
    device: torch.device,
    num_repeats: int,
    sent_share: float,
) -> tuple[float, float]:
    """Return (fixed seconds, bytes per second) of a collective of which a rank sends `sent_share` of its buffer."""
    seconds = []
    for size_bytes in SIZES_BYTES:
        values = torch.ones(size_bytes // 4, device=device)
        times = []
        for _ in range(num_repeats + 2):
            dist.barrier(group=group)
            begin_s = time.perf_counter()
            collective(values, group)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begin_s)
        seconds.append(statistics.median(times[2:]))
    fixed_s, per_byte_s = fit_line([sent_share * size for size in SIZES_BYTES], seconds)
    return fixed_s, 1 / per_byte_s if per_byte_s else UNLIMITED
