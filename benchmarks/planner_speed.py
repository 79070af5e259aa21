"""Seconds and memory of planning: Papilio's planner and TorchRec's, each in a process of its own.

    python -m benchmarks.planner_speed [--torchrec-limit-s 300]

Times are of planning alone, without imports; memory is the peak of the whole process, imports and all. Both plan the
same tables on meta for the same ranks; neither has a GPU or a process group.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time

# name: (tables, hosts of 8 GPUs, global batch)
CASES = {
    "Criteo Terabyte DLRM-DCNv2, 128 GPUs": ("criteo_terabyte", 16, 65_536),
    "200 tables, 64 GPUs": (200, 8, 65_536),
    "1,000 tables, 512 GPUs": (1_000, 64, 262_144),
}
HARDWARE = "dgx_a100"
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--torchrec-limit-s", type=float, default=300.0, help="TorchRec's planner is stopped after this"
    )
    parser.add_argument("--worker", nargs=2, metavar=("PLANNER", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        planner, case = options.worker
        print(json.dumps(_torchrec(case) if planner == "torchrec" else _papilio(case)))
        return
    print("| job | planner | seconds | peak MiB | times |\n|---|---|---|---|---|")
    for case in CASES:
        own = _run("papilio", case, None)
        assert own is not None
        print(f"| {case} | papilio | {own['seconds']:.2f} | {own['peak_mib']:.0f} | |", flush=True)
        theirs = _run("torchrec", case, options.torchrec_limit_s)
        if theirs is None:
            limit = options.torchrec_limit_s
            print(f"| | torchrec | more than {limit:.0f} | | more than {limit / own['seconds']:.0f} |", flush=True)
        else:
            ratio = theirs["seconds"] / own["seconds"]
            print(f"| | torchrec | {theirs['seconds']:.2f} | {theirs['peak_mib']:.0f} | {ratio:.0f} |", flush=True)


def _run(planner: str, case: str, limit_s: float | None) -> dict[str, float] | None:
    command = [sys.executable, "-m", "benchmarks.planner_speed", "--worker", planner, case]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return None
    return dict(json.loads(result.stdout.strip().splitlines()[-1]))


def _table_sizes(case: str) -> list[tuple[int, int, float]]:
    """Rows, columns and ids a sample of each table."""
    from papilio.data_pipeline.generate.shapes import SHAPES

    kind = CASES[case][0]
    if isinstance(kind, str):
        shape = SHAPES[kind]
        return [(rows, 128, float(ids)) for rows, ids in zip(shape.cardinalities, shape.pooling_factors, strict=True)]
    draw = random.Random(0)
    return [
        (int(10 ** draw.uniform(3, 8)), draw.choice([32, 64, 128]), float(draw.choice([1, 1, 5, 20, 50])))
        for _ in range(kind)
    ]


def _papilio(case: str) -> dict[str, float]:
    # What the command imports, so that the peak of memory is the command's.
    import papilio.trainer.run.plan_run  # noqa: F401
    from papilio.sharding.config import ShardingConfig
    from papilio.sharding.hardware import load_hardware
    from papilio.sharding.planner.job import Cluster, DenseWork, Job, Table
    from papilio.sharding.planner.make import make_plan

    _, num_nodes, batch_size = CASES[case]
    tables = tuple(
        Table(f"t_{i}", "tables", f"f_{i}", rows, dim, pooling_factor=ids)
        for i, (rows, dim, ids) in enumerate(_table_sizes(case))
    )
    dense = DenseWork(((13, 512), (512, 256), (256, 128), (3_456, 1_024), (1_024, 1)), 4_000_000, 0, 0, 10_000)
    job = Job(tables, dense, 13, batch_size, "bf16", "rowwise_adagrad", "adagrad")
    cluster = Cluster(load_hardware(HARDWARE), num_nodes, 8)
    seconds = []
    for _ in range(REPEATS):
        begin_s = time.perf_counter()
        make_plan(job, cluster, ShardingConfig(), recipe="benchmark", papilio_version="")
        seconds.append(time.perf_counter() - begin_s)
    return {"seconds": sorted(seconds)[REPEATS // 2], "peak_mib": _peak_mib()}


def _torchrec(case: str) -> dict[str, float]:
    import logging

    import torch
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology

    logging.disable(logging.CRITICAL)
    _, num_nodes, batch_size = CASES[case]
    sizes = _table_sizes(case)
    model = torch.nn.ModuleDict(
        {
            "tables": EmbeddingBagCollection(
                [
                    EmbeddingBagConfig(name=f"t_{i}", feature_names=[f"f_{i}"], num_embeddings=rows, embedding_dim=dim)
                    for i, (rows, dim, _) in enumerate(sizes)
                ],
                device=torch.device("meta"),
            )
        }
    )
    constraints = {f"t_{i}": ParameterConstraints(pooling_factors=[ids]) for i, (_, _, ids) in enumerate(sizes)}
    begin_s = time.perf_counter()
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=8 * num_nodes, local_world_size=8, compute_device="cuda", hbm_cap=80 << 30, ddr_cap=256 << 30
        ),
        batch_size=batch_size // (8 * num_nodes),
        constraints=constraints,
    )
    planner.plan(model, [EmbeddingBagCollectionSharder()])  # type: ignore[list-item]
    return {"seconds": time.perf_counter() - begin_s, "peak_mib": _peak_mib()}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
