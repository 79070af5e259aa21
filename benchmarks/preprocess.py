"""Preprocessing against TorchRec's `BinaryCriteoUtils.tsv_to_npys`, on the same Criteo text, in the same run.

    python -m benchmarks.preprocess --rows 1000000 --rows-baseline 1000000 [--num-workers 2] [--folder DIR]

Writes a Criteo-shaped text (Zipf ids with the cardinalities of the Kaggle data, 12 % missing), then times both in
processes of their own, alternately, and samples the resident memory of each process tree. TorchRec's function keeps raw
ids (no vocabulary) and writes .npy; Papilio builds exact vocabularies and writes shards with checksums.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Distinct ids of C1..C26 in Criteo Kaggle (facebookresearch/dlrm, its counts file).
KAGGLE_CARDINALITIES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
NUM_DENSE = 13
ROWS_AT_ONCE = 100_000
SAMPLE_EVERY_S = 0.05

_PAPILIO = """
from papilio.data_pipeline.preprocess.engine import preprocess
from papilio.data_pipeline.preprocess.preprocess_options import PreprocessOptions
import sys, time
if __name__ == "__main__":
    text, output, num_workers = sys.argv[1:]
    start_s = time.perf_counter()
    preprocess(PreprocessOptions(source="criteo", inputs=(text,), output=output, num_workers=int(num_workers)))
    print(time.perf_counter() - start_s)
"""
_TORCHREC = """
import sys, time, warnings
warnings.simplefilter("ignore")
from torchrec.datasets.criteo import BinaryCriteoUtils
text, output, _ = sys.argv[1:]
start_s = time.perf_counter()
paths = [f"{output}/{name}.npy" for name in ("dense", "sparse", "labels")]
BinaryCriteoUtils.tsv_to_npys(text, *paths)
print(time.perf_counter() - start_s)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows Papilio reads")
    parser.add_argument("--rows-baseline", type=int, default=1_000_000, help="rows TorchRec reads (0: leave it out)")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count(), help="Papilio's processes")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, alternating; the median counts")
    parser.add_argument("--folder", help="where to work; a temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        text = Path(folder, "day_0.tsv")
        write_criteo_text(text, arguments.rows, seed=0)
        baseline_text = text
        if arguments.rows_baseline != arguments.rows:
            baseline_text = Path(folder, "baseline.tsv")
            write_criteo_text(baseline_text, arguments.rows_baseline, seed=0)
        contenders = {"papilio": (_PAPILIO, text, arguments.rows)}
        if arguments.rows_baseline:
            contenders["torchrec"] = (_TORCHREC, baseline_text, arguments.rows_baseline)
        print_table(measure(contenders, folder, arguments.num_workers, arguments.repeats))


@dataclass(frozen=True)
class Run:
    """Wall seconds of the call (without imports, with the start of workers), CPU seconds, peak of the process tree."""

    wall_s: float
    cpu_s: float
    peak_mib: float


def measure(
    contenders: dict[str, tuple[str, Path, int]], folder: str, num_workers: int, repeats: int
) -> dict[str, tuple[float, float, float]]:
    """Rows/s of wall time, rows per CPU second (medians) and peak MiB (maximum) of each contender, run in turn."""
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, (script, text, rows) in contenders.items():
            run = run_once(script, text, folder, num_workers)
            print(
                f"{name}: {rows:,} rows, {run.wall_s:.2f} s, {run.cpu_s:.2f} CPU s, {run.peak_mib:.0f} MiB", flush=True
            )
            runs[name].append(run)
    return {
        name: (
            rows / statistics.median(run.wall_s for run in runs[name]),
            rows / statistics.median(run.cpu_s for run in runs[name]),
            max(run.peak_mib for run in runs[name]),
        )
        for name, (_, _, rows) in contenders.items()
    }


def run_once(script: str, text: Path, folder: str, num_workers: int) -> Run:
    """Run one contender in a process of its own. CPU seconds include imports."""
    output = Path(folder, "output")
    output.mkdir()
    script_path = Path(folder, "contender.py")
    script_path.write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    cpu_before_s = children_cpu_s()
    command = [sys.executable, str(script_path), str(text), str(output), str(num_workers)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    peak_bytes = 0
    while process.poll() is None:
        peak_bytes = max(peak_bytes, tree_resident_bytes(process.pid))
        time.sleep(SAMPLE_EVERY_S)
    shutil.rmtree(output)
    if process.returncode:
        raise SystemExit(f"contender failed with exit status {process.returncode}: {command}")
    assert process.stdout is not None
    wall_s = float(process.stdout.read().split()[-1])
    return Run(wall_s, children_cpu_s() - cpu_before_s, peak_bytes / 2**20)


def children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def tree_resident_bytes(root: int) -> int:
    """Resident memory of a process and its children (Linux); shared pages count once for each."""
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        try:
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
            waiting += [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def write_criteo_text(path: Path, num_rows: int, seed: int) -> None:
    """Write Criteo-shaped rows: small skewed integers, -1 and missing among them, Zipf ids of 8 hexadecimal digits."""
    generator = np.random.default_rng(seed)
    with path.open("wb") as file:
        for start in range(0, num_rows, ROWS_AT_ONCE):
            file.write(criteo_rows(min(ROWS_AT_ONCE, num_rows - start), generator))


def criteo_rows(num_rows: int, generator: np.random.Generator) -> bytes:
    columns = [np.where(generator.random(num_rows) < 0.25, b"1", b"0").astype("S12")]
    for i in range(NUM_DENSE):
        numbers = np.floor(generator.lognormal(1 + 0.4 * i, 2.0, num_rows)).astype(np.int64) % 10_000_000 - (i == 1)
        columns.append(blank(numbers.astype("S12"), 0.12, generator))
    for column, cardinality in enumerate(KAGGLE_CARDINALITIES):
        ranks = np.floor(cardinality ** generator.random(num_rows)).astype(np.uint64)  # log-uniform: Zipf, exponent 1
        keys = (ranks * np.uint64(2654435761) + np.uint64(column * 40503)) % np.uint64(2**32)
        columns.append(blank(hexadecimal(keys), 0.12 if column % 3 == 2 else 0.0, generator))
    return b"\n".join(b"\t".join(row) for row in zip(*(c.tolist() for c in columns), strict=True)) + b"\n"


def blank(values: NDArray[np.bytes_], rate: float, generator: np.random.Generator) -> NDArray[np.bytes_]:
    values[generator.random(len(values)) < rate] = b""
    return values


def hexadecimal(keys: NDArray[np.uint64]) -> NDArray[np.bytes_]:
    digits = (keys[:, None] >> np.arange(28, -4, -4, dtype=np.uint64)) & np.uint64(15)
    return np.frombuffer(b"0123456789abcdef", np.uint8)[digits].view("S8")[:, 0].copy()


def print_table(results: dict[str, tuple[float, float, float]]) -> None:
    print(f"{'':10} {'rows/s':>12} {'rows/CPU s':>12} {'peak MiB':>10}")
    for name, (rows_per_s, rows_per_cpu_s, peak_mib) in results.items():
        print(f"{name:10} {rows_per_s:12,.0f} {rows_per_cpu_s:12,.0f} {peak_mib:10,.0f}")
    if "torchrec" in results:
        print(f"papilio / torchrec: {results['papilio'][0] / results['torchrec'][0]:.1f} x rows/s")


if __name__ == "__main__":
    main()
