"""What number formats cost in quality and give in size and speed: tables and the dense part of trained models.

    python -m benchmarks.quantization_study [--seeds 1 2 3] [--rows N] [--data DIR] [--runs DIR ...] [--json FILE]

Generates data with a known teacher, trains the quick start's recipe on it in fp32 once for each seed (initial weights
and order of samples), and then stores each model with every precision and quantizer of tables, with mixes that
`--quantize auto` finds, and with its dense part in fp32, bf16 and int8. All of them score the test split, which is
compared with the fp32 model sample by sample. Speed is of the eager model on one thread, by CPU time, all kinds in
turn: the median over rounds of the first model. `--runs` takes trained runs instead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from papilio.data_pipeline.dataset import Dataset, open_dataset
from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.inference.backends.dense_backends import for_many_samples
from papilio.trainer.inference.backends.flat_model import FlatModel, build_dense_of, build_flat_model
from papilio.trainer.inference.export.comparison import Comparison, compare_scores, expected_loss_increases
from papilio.trainer.inference.export.export_options import QUANTIZERS
from papilio.trainer.inference.export.held_out import BLOCK_ROWS, Block, HeldOut
from papilio.trainer.inference.export.precision_search import choose
from papilio.trainer.inference.export.trained_model import TrainedModel, open_trained_model
from papilio.trainer.inference.package.format import DENSE, Package, Precision, QuantizerName
from papilio.trainer.inference.package.table_writer import TableChoice
from papilio.trainer.inference.package.writer import write_model

ROWS = 1_000_000
NUM_ROUNDS = 15
BUDGETS = (0.19, 0.14)
DENSE_BITS = {"fp32": 32, "bf16": 16, "int8": 8}


@dataclass(frozen=True)
class Kind:
    """A way to store a model: its tables (all in `precision`, or a mix within a budget) and its dense part."""

    precision: Precision | None
    quantizer: QuantizerName | None = None
    dense: str = "fp32"
    budget: float | None = None

    @property
    def name(self) -> str:
        """What the table calls it."""
        tables = f"auto {self.budget:g}" if self.budget else str(self.precision)
        return f"{tables:<10}{self.quantizer or '':<15}{self.dense:<6}"


KINDS = (
    Kind("fp32"),
    Kind("fp16"),
    Kind("int8", "minmax"),
    *(Kind("int4", quantizer) for quantizer in QUANTIZERS),
    *(Kind("int2", quantizer) for quantizer in QUANTIZERS),
    *(Kind(None, "least_squares", budget=budget) for budget in BUDGETS),
    *(Kind("fp32", dense=dense) for dense in ("bf16", "int8")),
    *(Kind("int8", "minmax", dense) for dense in ("bf16", "int8")),
    Kind("int4", "least_squares", "bf16"),
)


@dataclass(frozen=True)
class Figures:
    """What was measured of one kind of one model.

    `expected_increase` of the log loss is free of the labels' noise: the mean divergence of the two predictions.
    """

    kind: str
    run: str
    num_bytes: int
    size_share: float
    row_error: float
    expected_increase: float
    comparison: Comparison


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--rows", type=int, default=ROWS, help="generated rows, of which a twentieth are the test split"
    )
    parser.add_argument("--data", help="a data set (generated anew by default)")
    parser.add_argument("--runs", nargs="+", help="trained runs (trained anew by default)")
    parser.add_argument("--nproc", type=int, default=2, help="ranks of each training")
    parser.add_argument("--batch-size", type=int, default=2048, help="of the measurement of speed")
    parser.add_argument("--json", help="file to write all figures to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        runs = options.runs or train_runs(options, folder)
        found, speeds = [], dict.fromkeys((kind.name for kind in KINDS), 0.0)
        for number, run in enumerate(runs):
            study = Study(run, options.data, os.path.join(folder, f"packages_{number}"))
            found += [study.measure(kind) for kind in KINDS]
            if number == 0:
                speeds = study.samples_per_s(options.batch_size)
        print_table(found, speeds, options.batch_size, len(runs))
    if options.json:
        entries = [{**asdict(figures), "comparison": figures.comparison.model_dump()} for figures in found]
        Path(options.json).write_text(json.dumps({"figures": entries, "samples_per_s": speeds}), encoding="utf-8")


def train_runs(options: argparse.Namespace, folder: str) -> list[str]:
    """Generate the data set if there is none, train a run for each seed, and return their folders."""
    if options.data is None:
        options.data = os.path.join(folder, "data")
        command = ["generate", "--shape", "criteo_small", "--rows", str(options.rows), "--output", options.data]
        subprocess.run([sys.executable, "-m", "papilio.launch.cli", *command], check=True)
    runs = []
    for seed in options.seeds:
        run = os.path.join(folder, f"run_{seed}")
        command = ["train", "--recipe", "quickstart", "--nproc", str(options.nproc)]
        command += [f"--data.path={options.data}", f"--seed={seed}", f"--output.run_dir={run}"]
        command += ["--output.tensorboard=false"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "papilio.launch.cli", *command], env=environment, check=True)
        runs.append(run)
    return runs


class Study:
    """One trained model, stored in every way."""

    def __init__(self, run: str, data: str | None, folder: str) -> None:
        checkpoints = CheckpointFolder(os.path.join(run, "checkpoints"))
        self._run, self._folder = run, folder
        self._trained: TrainedModel = open_trained_model(checkpoints, checkpoints.committed()[-1].name)
        self._dataset: Dataset = open_dataset(data or str(self._trained.marker.data["path"]))
        self._held_out = HeldOut.for_gate(self._dataset)
        self._packages: dict[tuple[object, ...], Package] = {}
        self._reference = self._package(Kind("fp32"))
        self._labels = np.concatenate([block.labels for block in self._held_out.blocks()])
        self._logits = self._score(build_flat_model(self._reference))

    def measure(self, kind: Kind) -> Figures:
        """Score the test split with a kind, and compare."""
        package = self._package(kind)
        tables = package.manifest.tables
        logits = self._score(self._model(kind))
        comparison = compare_scores(self._logits, logits, self._labels)
        table_bytes = sum(table.num_bytes for table in tables)
        print(f"{self._run}: {kind.name}: AUC {comparison.candidate.auc:.6f}", file=sys.stderr, flush=True)
        return Figures(
            kind=kind.name,
            run=self._run,
            num_bytes=table_bytes + package.manifest.files[DENSE].num_bytes * DENSE_BITS[kind.dense] // 32,
            size_share=table_bytes / sum(table.fp32_bytes for table in tables),
            row_error=float(np.mean([table.row_error.mean_relative for table in tables])),
            expected_increase=float(expected_loss_increases(self._logits, logits).mean()),
            comparison=comparison,
        )

    def samples_per_s(self, batch_size: int) -> dict[str, float]:
        """Time all kinds in turn on batches of the test split."""
        models = {kind.name: self._model(kind) for kind in KINDS}
        block = next(self._held_out.blocks())
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(NUM_ROUNDS + 2):
            for name, model in models.items():
                batch = first_samples(block, batch_size, model.lookup.num_features)
                started = time.thread_time()
                model(*batch)
                seconds[name].append(time.thread_time() - started)
        # The first two rounds warm up.
        return {name: len(batch[0]) / statistics.median(found[2:]) for name, found in seconds.items()}

    def _package(self, kind: Kind) -> Package:
        key = (kind.precision, kind.quantizer, kind.budget)
        if key not in self._packages:
            folder = os.path.join(self._folder, str(len(self._packages)))
            choices = self._choices(kind)
            self._packages[key] = write_model(
                self._trained, self._dataset, choices, folder, run=self._run, on_bytes=lambda num_bytes: None
            )
        return self._packages[key]

    def _choices(self, kind: Kind) -> dict[str, TableChoice]:
        quantizer = kind.quantizer or "minmax"
        if kind.precision is not None:
            return dict.fromkeys(self._trained.tables, TableChoice(kind.precision, quantizer))
        assert kind.budget is not None
        held_out = HeldOut.for_search(self._dataset)
        return choose(self._reference, held_out, size_budget=kind.budget, fixed={}, quantizer=quantizer)

    def _model(self, kind: Kind) -> FlatModel:
        package = self._package(kind)
        model = build_flat_model(package)
        model.dense_part = dense_in(kind.dense, package)
        return model

    def _score(self, model: FlatModel) -> np.ndarray:
        blocks = self._held_out.blocks()
        scores = [model.score(block.dense, model.pool(block.ids, block.lengths)).float().numpy() for block in blocks]
        return np.concatenate(scores)


def dense_in(precision: str, package: Package) -> nn.Module:
    """Return a package's dense part with its matrix products in fp32, bf16 (fp32 last) or dynamic int8."""
    part = build_dense_of(package)
    if precision == "bf16":
        return for_many_samples(part)
    if precision == "int8":
        quantized: nn.Module = torch.ao.quantization.quantize_dynamic(part, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-untyped-call]
        return quantized
    return part


def first_samples(block: Block, count: int, num_features: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the first samples of a block as a model's inputs."""
    size = len(block.labels)
    assert count <= min(size, BLOCK_ROWS)
    lengths = block.lengths.view(num_features, size)
    ids = torch.split(block.ids, lengths.sum(1).tolist())
    kept = [found[: int(lengths[number, :count].sum())] for number, found in enumerate(ids)]
    return block.dense[:count].contiguous(), torch.cat(kept), lengths[:, :count].reshape(-1).contiguous()


def print_table(found: Sequence[Figures], speeds: dict[str, float], batch_size: int, num_runs: int) -> None:
    """Print a line for each kind: means over the runs; of differences also the range, and what sampling does to one."""
    samples = found[0].comparison.num_samples
    print(f"\n{samples:,} test samples, {num_runs} models; differences from fp32: mean (least to most over models);")
    print("loss: what labels drawn from the fp32 model's probabilities would show, in nats a sample")
    print(
        f"{'tables':<10}{'quantizer':<15}{'dense':<6}{'MiB':>6}{'tables':>8}{'row error':>11}{'AUC':>9}"
        f"{'AUC change, 1e-6':>30}{'± 1.96 s.e.':>13}{'NE change, 1e-6':>30}"
        f"{'loss, 1e-6':>12}{'99 % change less':>18}{'samples/s':>11}   (batch {batch_size})"
    )
    for kind in KINDS:
        of_kind = [figures for figures in found if figures.kind == kind.name]
        comparisons = [figures.comparison for figures in of_kind]
        auc = [c.candidate.auc - c.reference.auc for c in comparisons]
        ne = [c.candidate.ne - c.reference.ne for c in comparisons]
        error = 1.96e6 * statistics.mean(c.auc_difference_error for c in comparisons)
        loss = 1e6 * statistics.mean(figures.expected_increase for figures in of_kind)
        least = statistics.mean(c.differences.absolute_quantiles["0.99"] for c in comparisons)
        print(
            f"{kind.name}{of_kind[0].num_bytes / 2**20:>6.1f}{of_kind[0].size_share:>8.1%}"
            f"{statistics.mean(f.row_error for f in of_kind):>11.2%}"
            f"{statistics.mean(c.candidate.auc for c in comparisons):>9.5f}"
            f"{_range(auc):>30}{error:>13.1f}{_range(ne):>30}"
            f"{loss:>12.3f}{least:>18.1e}{speeds[kind.name]:>11,.0f}"
        )


def _range(differences: Sequence[float]) -> str:
    scaled = [difference * 1e6 for difference in differences]
    return f"{statistics.mean(scaled):+.0f} ({min(scaled):+.0f} to {max(scaled):+.0f})"


if __name__ == "__main__":
    main()
