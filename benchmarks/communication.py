"""What fewer bits between ranks, and replicated groups, cost in AUC and save in bytes; on 4 gloo ranks.

    python -m benchmarks.communication [--seeds 1 2 3] [--rows 1000000] [--data DIR]

Three tables: relative errors of pooled embeddings and of table updates by precision; bytes that a rank sends in a step,
counted in the collectives and by formula; and the test AUC of the quick start (with dim 32 and whole tables), one
epoch, for every variant and seed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks.rank_lines import run_ranks

NUM_RANKS = 4
# int8 packs 32 columns together; whole tables alone can travel in it, and the formulas are theirs.
COMMON = ("--model.embedding_dim=32", '--sharding.types=["table_wise"]')
GROUPS = "--sharding.replicas.num_groups=2"
# Settings of each variant, on top of the quick start's recipe and these.
VARIANTS = {
    "fp32": (),
    "fp16": ("--sharding.communication.forward=fp16", "--sharding.communication.backward=fp16"),
    "int8, gradients fp16": ("--sharding.communication.forward=int8", "--sharding.communication.backward=fp16"),
    "int8": ("--sharding.communication.forward=int8", "--sharding.communication.backward=int8"),
    "2 groups, averaged every step": (GROUPS,),
    "2 groups, averaged every step, rate x 1.41": (GROUPS, "--optimizer.sparse.learning_rate=0.1414"),
    "2 groups, averaged every 10 steps": (GROUPS, "--sharding.replicas.sync_every_steps=10"),
    "2 groups, independent tables": (GROUPS, "--sharding.replicas.independent_tables=true"),
    "4 groups, independent tables": (
        "--sharding.replicas.num_groups=4",
        "--sharding.replicas.independent_tables=true",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--data", help="a generated data set of shape criteo_small (made anew by default)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            options.data = os.path.join(folder, "data")
            command = ["generate", "--shape", "criteo_small", "--rows", str(options.rows), "--output", options.data]
            subprocess.run([sys.executable, "-m", "papilio.launch.cli", *command], check=True)
        _print_errors()
        _print_bytes(options.data)
        _print_accuracy(options, folder)


def _print_errors() -> None:
    print("\n| sharding | forward | backward | error of pooled embeddings | error of updates |\n|---|---|---|---|---|")
    for row in _run_worker("errors", []):
        print(f"| {row['type']} | {row['forward']} | {row['backward']} | {row['pooled']:.1e} | {row['update']:.1e} |")


def _print_bytes(data: str) -> None:
    print("\n| variant | embeddings, KiB a step and rank | by formula | table averaging, same | by formula |")
    print("|---|---|---|---|---|")
    keys = ("embedding_bytes", "embedding_formula_bytes", "averaging_bytes", "averaging_formula_bytes")
    jobs = [[f"--data.path={data}", *COMMON, *settings] for settings in VARIANTS.values()]
    for name, found in zip(VARIANTS, _run_worker("bytes", jobs), strict=True):
        print(f"| {name} | " + " | ".join(f"{found[key] / 1024:,.1f}" for key in keys) + " |", flush=True)


def _print_accuracy(options: argparse.Namespace, folder: str) -> None:
    print(f"\n| variant | test AUC, mean of {len(options.seeds)} seeds | against fp32 | each |\n|---|---|---|---|")
    fixed = [f"--data.path={options.data}", f"--output.run_dir={folder}/run", "--output.tensorboard=false", *COMMON]
    jobs = [[*fixed, f"--seed={seed}", *settings] for settings in VARIANTS.values() for seed in options.seeds]
    results = _run_worker("auc", jobs)
    exact: list[float] = []
    for name in VARIANTS:
        aucs = [next(results)["auc"] for _ in options.seeds]
        exact = exact or aucs
        change = statistics.mean(aucs) - statistics.mean(exact)
        each = " ".join(f"{auc:.4f}" for auc in aucs)
        print(f"| {name} | {statistics.mean(aucs):.4f} | {change:+.4f} | {each} |", flush=True)


def _run_worker(kind: str, variants: list[list[str]]) -> Iterator[dict[str, Any]]:
    return run_ranks("benchmarks.communication_worker", [kind, json.dumps(variants)], NUM_RANKS)


if __name__ == "__main__":
    main()
