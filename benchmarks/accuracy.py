"""What bf16 costs in AUC, and how near one epoch comes to the best possible: the quick start over several seeds.

    python -m benchmarks.accuracy [--seeds 1 2 3 4 5] [--data DIR] [--nproc 2] [--section.key=value ...]

Every seed (initial weights and sample order) trains the quick start's recipe once in fp32 and once in bf16 on the same
data; the table shows the test AUC of both, their difference, and the gap to the teacher's own AUC.
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

ROWS = 1_000_000
PRECISIONS = ("fp32", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--data", help="the quick start's data set (made anew by default)")
    parser.add_argument("--nproc", type=int, default=2)
    options, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            options.data = os.path.join(folder, "data")
            command = ["generate", "--shape", "criteo_small", "--rows", str(ROWS), "--output", options.data]
            subprocess.run([sys.executable, "-m", "papilio.launch.cli", *command], check=True)
        splits = json.loads(Path(options.data, "manifest.json").read_text())["splits"]
        best = splits["test"]["best_auc"]
        print(f"{'seed':>5}{'fp32':>9}{'bf16':>9}{'bf16 - fp32':>13}{'gap of bf16':>13}   (test AUC; best {best:.4f})")
        rows = []
        for seed in options.seeds:
            found = [
                train(options, overrides, seed, precision, f"{folder}/{precision}-{seed}") for precision in PRECISIONS
            ]
            rows.append(found)
            print_row(str(seed), found, best)
        print_row("mean", [statistics.mean(column) for column in zip(*rows, strict=True)], best)


def train(options: argparse.Namespace, overrides: list[str], seed: int, precision: str, run_dir: str) -> float:
    """Train once and return the test AUC."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={options.nproc}"]
    command += [
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        "-m",
        "papilio.trainer.train",
        "--recipe",
        "quickstart",
    ]
    command += [f"--data.path={options.data}", f"--seed={seed}", f"--train.precision={precision}"]
    command += [f"--output.run_dir={run_dir}", "--output.tensorboard=false", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return float(json.loads(Path(run_dir, "summary.json").read_text())["final"]["test"]["auc"])


def print_row(label: str, found: list[float], best: float) -> None:
    fp32, bf16 = found
    print(f"{label:>5}{fp32:>9.4f}{bf16:>9.4f}{bf16 - fp32:>+13.5f}{best - bf16:>13.4f}", flush=True)


if __name__ == "__main__":
    main()
