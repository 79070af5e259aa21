"""Copies of one packaged model that share a machine, each in a process and a closed loop of its own.

Started by `benchmarks/colocation.py` with the OpenMP wait policy in its environment, which libgomp reads but once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from papilio.trainer.inference.backends.flat_model import FlatModel, build_flat_model
from papilio.trainer.inference.package.format import Package, read_package

# So many that those of a batch of one do not all stay in the cache.
NUM_REQUEST_SAMPLES = 64
MIN_REQUEST_SETS = 4
NUM_WARM_UP = 3
JOIN_TIMEOUT_S = 300


def main() -> None:
    """Measure the sets of copies described in the first argument, a JSON list; print a JSON line for each batch."""
    job = json.loads(sys.argv[1])
    # Copies are forked from a process that has imported torch and done nothing else.
    multiprocessing.set_forkserver_preload(["papilio.trainer.inference.backends.flat_model"])
    context = multiprocessing.get_context("forkserver")
    for each in job["sets"]:
        for row in measure(context, each, job["batch_sizes"], job["seconds"]):
            print(json.dumps(row), flush=True)


def measure(context: Any, each: dict[str, Any], batch_sizes: list[int], seconds: float) -> list[dict[str, Any]]:
    """Run the copies of a set side by side; return a row for each batch size."""
    num_copies = each["copies"]
    barrier = context.Barrier(num_copies)
    results = context.SimpleQueue()
    arguments = (each, batch_sizes, seconds, barrier, results)
    copies = [context.Process(target=run_copy, args=(number, *arguments)) for number in range(num_copies)]
    for copy in copies:
        copy.start()
    found = [results.get() for _ in copies]
    for copy in copies:
        copy.join()
    return [_row(each, size, [result[size] for result in found]) for size in batch_sizes]


def _row(each: dict[str, Any], batch_size: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    latencies = np.concatenate([result["seconds"] for result in results])
    p50, p95, p99 = (float(value) for value in np.percentile(latencies * 1e3, (50, 95, 99)))
    return {
        **{key: each[key] for key in ("shape", "copies", "threads", "waits", "weights")},
        "batch_size": batch_size,
        "samples_per_s": sum(len(result["seconds"]) / result["wall_s"] for result in results) * batch_size,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "num_requests": len(latencies),
        "cpu_us_per_sample": sum(result["cpu_s"] for result in results) / (len(latencies) * batch_size) * 1e6,
        "memory_mib": sum(result["pss_mib"] for result in results),
        # Cores that other processes kept busy, or the host took away: the figures are of the copies alone if it is 0.
        "other_cores": max(0.0, _other_cores(results)),
    }


def _other_cores(results: list[dict[str, Any]]) -> float:
    longest = max(results, key=lambda result: float(result["wall_s"]))
    own_s = sum(result["cpu_s"] * longest["wall_s"] / result["wall_s"] for result in results)
    return float(longest["busy_s"] - own_s) / float(longest["wall_s"])


def run_copy(
    number: int, each: dict[str, Any], batch_sizes: list[int], seconds: float, barrier: Any, results: Any
) -> None:
    """Load the model and answer requests, batch size after batch size, all copies at the same time."""
    torch.set_num_threads(each["threads"])
    package = read_package(each["package"])
    model = build_flat_model(package, is_mapped=each["weights"] == "shared")
    generator = torch.Generator().manual_seed(number)
    found = {}
    for size in batch_sizes:
        requests = make_requests(package, size, each["ids_per_bag"], generator)
        for request in requests[:NUM_WARM_UP]:
            answer(model, request)
        barrier.wait(JOIN_TIMEOUT_S)
        found[size] = _closed_loop(model, requests, seconds) | {"pss_mib": pss_mib()}
        barrier.wait(JOIN_TIMEOUT_S)
    results.put(found)


def make_requests(
    package: Package, size: int, ids_per_bag: int, generator: torch.Generator
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return inputs of the model, with uniform ids: the worst for caches."""
    tables = package.manifest.tables
    num_sets = max(MIN_REQUEST_SETS, NUM_REQUEST_SAMPLES // size)
    lengths = torch.full((len(tables) * size,), ids_per_bag, dtype=torch.int32)
    made = []
    for _ in range(num_sets):
        ids = [
            torch.randint(0, table.rows, (size * ids_per_bag,), generator=generator, dtype=torch.int32)
            for table in tables
        ]
        dense = torch.rand(size, len(package.manifest.dense_features), generator=generator)
        made.append((dense, torch.cat(ids), lengths))
    return made


def answer(model: FlatModel, request: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Score one request."""
    with torch.inference_mode():
        model(*request)


def _closed_loop(
    model: FlatModel, requests: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], seconds: float
) -> dict[str, Any]:
    latencies: list[float] = []
    begin_s = now_s = time.perf_counter()
    begin_cpu_s, begin_busy_s = time.process_time(), busy_s()
    while now_s - begin_s < seconds or len(latencies) < MIN_REQUEST_SETS:
        answer(model, requests[len(latencies) % len(requests)])
        before_s, now_s = now_s, time.perf_counter()
        latencies.append(now_s - before_s)
    return {
        "seconds": np.array(latencies),
        "wall_s": now_s - begin_s,
        "cpu_s": time.process_time() - begin_cpu_s,
        "busy_s": busy_s() - begin_busy_s,
    }


def busy_s() -> float:
    """Seconds that this machine's cores were busy so far, or were taken by its host."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, *others = map(int, file.readline().split()[1:9])
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")


def pss_mib() -> float:
    """Memory of this process in MiB; a page that n processes share counts an n-th in each."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


if __name__ == "__main__":
    main()
