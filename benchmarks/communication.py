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
from pathlib import Path
from typing import Any

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
            subprocess.run([sys.executable, "-m", "launch.cli", *command], check=True)
        _print_errors()
        _print_bytes(options.data)
        _print_accuracy(options, folder)


def _print_errors() -> None:
    print("\n| sharding | forward | backward | error of pooled embeddings | error of updates |\n|---|---|---|---|---|")
    for row in _run_worker("errors"):
        print(f"| {row['type']} | {row['forward']} | {row['backward']} | {row['pooled']:.1e} | {row['update']:.1e} |")


def _print_bytes(data: str) -> None:
    print("\n| variant | embeddings, KiB a step and rank | by formula | table averaging, same | by formula |")
    print("|---|---|---|---|---|")
    for name, settings in VARIANTS.items():
        found = _run_worker("bytes", f"--data.path={data}", *COMMON, *settings)
        keys = ("embedding_bytes", "embedding_formula_bytes", "averaging_bytes", "averaging_formula_bytes")
        print(f"| {name} | " + " | ".join(f"{found[key] / 1024:,.1f}" for key in keys) + " |", flush=True)


def _print_accuracy(options: argparse.Namespace, folder: str) -> None:
    print(f"\n| variant | test AUC, mean of {len(options.seeds)} seeds | against fp32 | each |\n|---|---|---|---|")
    means: dict[str, float] = {}
    for number, (name, settings) in enumerate(VARIANTS.items()):
        found = [_train(options.data, settings, seed, f"{folder}/{number}-{seed}") for seed in options.seeds]
        means[name] = statistics.mean(found)
        each = " ".join(f"{auc:.4f}" for auc in found)
        print(f"| {name} | {means[name]:.4f} | {means[name] - means['fp32']:+.4f} | {each} |", flush=True)


def _torchrun(*arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={NUM_RANKS}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "--", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{result.stderr[-4000:]}")
    return result.stdout


def _run_worker(*arguments: str) -> Any:
    """Return what rank 0 printed, from JSON."""
    return json.loads(_torchrun("benchmarks.communication_worker", *arguments).strip().splitlines()[-1])


def _train(data: str, settings: tuple[str, ...], seed: int, run_dir: str) -> float:
    """Train once and return the test AUC."""
    arguments = ["--recipe", "quickstart", f"--data.path={data}", f"--seed={seed}", f"--output.run_dir={run_dir}"]
    _torchrun("trainer.train", *arguments, "--output.tensorboard=false", *COMMON, *settings)
    return float(json.loads(Path(run_dir, "summary.json").read_text())["final"]["test"]["auc"])


if __name__ == "__main__":
    main()
