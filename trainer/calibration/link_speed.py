"""How fast ranks talk to each other: `python -m papilio.trainer.calibration.link_speed`, one process a rank.

Started by the workers of `papilio preflight` with torchrun's variables, without its agent. Each rank prints a JSON line
for each thing it begins, and one with its figures at the end; whoever started it ends a rank that stands still.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from papilio.trainer.elastic.exit_codes import exit_now

TIMEOUT_S = 60.0
# Messages grow from the first size until one takes so long, or has the last size (of a GPU).
FIRST_BYTES = 64 << 10
ENOUGH_S = 0.03
MOST_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
NUM_REPEATS = 5
VALUE_BYTES = 4

Exchange = Callable[[torch.Tensor], None]


def main() -> int:
    """Measure, and print the figures."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    _say(phase="loading")
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if has_gpu else "gloo"
    _say(phase=f"joining the {backend} process group")
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S))
    try:
        figures = measure(rank, world_size, local_world_size, device)
    finally:
        dist.destroy_process_group()
    _say(speed={"rank": rank, "backend": backend, **figures})
    return 0


def measure(rank: int, world_size: int, local_world_size: int, device: torch.device) -> dict[str, float]:
    """Time an all-to-all and an all-reduce of all ranks, and a ring of hosts. Collective; the times are this rank's.

    Returns:
        Bytes of a message, and the median seconds of each exchange of one.
    """

    def all_to_all(values: torch.Tensor) -> None:
        dist.all_to_all_single(torch.empty_like(values), values)

    _say(phase="all-to-all")
    num_bytes = _find_size(all_to_all, device, world_size)
    values = torch.ones(num_bytes // VALUE_BYTES, device=device)
    all_to_all_s = _time(all_to_all, values)
    _say(phase="all-reduce")
    all_reduce_s = _time(dist.all_reduce, values)
    _say(phase="exchange with the neighbouring hosts")
    is_wide = world_size > local_world_size
    neighbour_s = _receive_from_before(values, rank, world_size, local_world_size) if is_wide else 0.0
    return {
        "message_bytes": num_bytes,
        "all_to_all_s": all_to_all_s,
        "all_reduce_s": all_reduce_s,
        "neighbour_s": neighbour_s,
    }


def _find_size(exchange: Exchange, device: torch.device, world_size: int) -> int:
    """Return bytes of a message that takes hundredths of a second; equal on all ranks, divisible by their number."""
    num_bytes = FIRST_BYTES
    while True:
        num_bytes += -num_bytes % (VALUE_BYTES * world_size)
        values = torch.ones(num_bytes // VALUE_BYTES, device=device)
        exchange(values)  # connections are made with the first message
        slowest_s = torch.tensor(_once(exchange, values), device=device)
        dist.all_reduce(slowest_s, op=dist.ReduceOp.MAX)
        if slowest_s.item() >= ENOUGH_S or num_bytes >= MOST_BYTES[device.type]:
            return num_bytes
        num_bytes *= 4


def _receive_from_before(values: torch.Tensor, rank: int, world_size: int, local_world_size: int) -> float:
    """Send to the same rank of the next host and receive from that of the host before; return seconds of receiving.

    Of two links of a host one is used at a time, so that the times of fast links do not hide behind slow ones.
    """
    num_hosts, host = world_size // local_world_size, rank // local_world_size
    after, before = (rank + local_world_size) % world_size, (rank - local_world_size) % world_size
    received, took_s = torch.empty_like(values), 0.0
    for turn in range(2 + num_hosts % 2):
        operations = []
        if _turn_of(host, num_hosts) == turn:
            operations.append(dist.P2POp(dist.isend, values, after))
        if _turn_of((host - 1) % num_hosts, num_hosts) == turn:
            operations.append(dist.P2POp(dist.irecv, received, before))

        def exchange(_: torch.Tensor, operations: list[dist.P2POp] = operations) -> None:
            for work in dist.batch_isend_irecv(operations) if operations else ():
                work.wait()

        turn_s = _time(exchange, values)
        took_s = turn_s if _turn_of((host - 1) % num_hosts, num_hosts) == turn else took_s
    return took_s


def _turn_of(host: int, num_hosts: int) -> int:
    """Return when a host sends to the next one: neighbouring links of a ring have different turns."""
    return 2 if num_hosts % 2 and host == num_hosts - 1 else host % 2


def _time(exchange: Exchange, values: torch.Tensor) -> float:
    exchange(values)
    return statistics.median(_once(exchange, values) for _ in range(NUM_REPEATS))


def _once(exchange: Exchange, values: torch.Tensor) -> float:
    dist.barrier()
    if values.is_cuda:
        torch.cuda.synchronize()
    begin_s = time.perf_counter()
    exchange(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin_s


def _say(**what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    try:
        status = main()
    except (dist.DistError, RuntimeError, ValueError) as error:
        print(str(error).strip().partition("\n")[0], file=sys.stderr, flush=True)
        status = 1
    exit_now(status)
