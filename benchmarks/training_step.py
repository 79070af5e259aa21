"""Samples per second of a training step: Papilio against plain TorchRec and plain PyTorch, side by side.

    python -m benchmarks.training_step [--sparse-optimizer sgd|rowwise_adagrad] [--rounds 5] [--data DIR]

Every variant trains the Kaggle-like DLRM (26 tables of up to 1e6 rows, dim 16, bottom 13-512-256-64-16, top 512-256-1)
on the same generated samples, global batch 2048, as 2 processes of one thread each. The variants take turns, a fresh
pair of processes each time; a round's figure is the mean over a window of steps after a warm-up, and the table shows
medians over the rounds and the ratio to Papilio of the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch

from papilio.trainer.runtime import no_garbage_collection

VARIANTS = ("papilio", "papilio_fp32", "torchrec", "pytorch")
GLOBAL_BATCH_SIZE = 2048
NUM_RANKS = 2
LEARNING_RATE = 0.05
MAX_ATTEMPTS = 3
LAYERS = {"dense": (512, 256, 64), "over": (512, 256)}
EMBEDDING_DIM = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparse-optimizer", choices=("sgd", "rowwise_adagrad"), default="sgd")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup-steps", type=int, default=30)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=600_000, help="rows to generate when --data is not given")
    parser.add_argument("--data", help="a generated data set of shape criteo")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            options.data = os.path.join(folder, "data")
            command = ["generate", "--shape", "criteo", "--rows", str(options.rows), "--output", options.data]
            subprocess.run([sys.executable, "-m", "papilio.launch.cli", *command], check=True)
        rounds = [{name: _run(name, options) for name in options.variants} for _ in range(options.rounds)]
    _print_table(rounds, options)


def _run(variant: str, options: argparse.Namespace) -> float:
    """Run one variant in fresh processes and return its samples per second."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={NUM_RANKS}", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "-m", "benchmarks.training_step", "--worker", variant]
    command += ["--sparse-optimizer", options.sparse_optimizer, "--data", options.data]
    command += ["--warmup-steps", str(options.warmup_steps), "--steps", str(options.steps)]
    for attempt in range(1, MAX_ATTEMPTS + 1):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not result.returncode:
            break
        # Plain DDP now and then dies of a segmentation fault in gloo's sparse all-reduce.
        print(f"  {variant} failed (attempt {attempt} of {MAX_ATTEMPTS})", flush=True)
    else:
        raise SystemExit(f"{variant} failed:\n{result.stderr[-4000:]}")
    samples_per_s = json.loads(result.stdout.strip().splitlines()[-1])["samples_per_s"]
    print(f"  {variant:<14}{samples_per_s:>10,.0f} samples/s", flush=True)
    return float(samples_per_s)


def _print_table(rounds: list[dict[str, float]], options: argparse.Namespace) -> None:
    print(f"\nsparse optimizer {options.sparse_optimizer}, medians of {len(rounds)} alternating rounds")
    print(f"{'variant':<16}{'samples/s':>12}{'ms/step':>10}{'papilio is faster by':>23}")
    for name in options.variants:
        median = statistics.median(found[name] for found in rounds)
        ratio = statistics.median(found["papilio"] / found[name] for found in rounds)
        print(f"{name:<16}{median:>12,.0f}{GLOBAL_BATCH_SIZE / median * 1e3:>10.1f}{ratio:>22.2f}x")


def _work(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    make_step = {"torchrec": _plain_torchrec, "pytorch": _plain_pytorch}.get(options.worker, _papilio)
    step, finish = make_step(options)
    for _ in range(options.warmup_steps):
        step()
    # Papilio's loop keeps Python's garbage collector out of the steps; a plain loop does not.
    quiet = no_garbage_collection() if options.worker.startswith("papilio") else contextlib.nullcontext()
    with quiet:
        torch.distributed.barrier()
        begin_s = time.perf_counter()
        for _ in range(options.steps):
            step()
        torch.distributed.barrier()
        elapsed_s = time.perf_counter() - begin_s
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"samples_per_s": options.steps * GLOBAL_BATCH_SIZE / elapsed_s}), flush=True)
    finish()


Steps = tuple[Callable[[], object], Callable[[], object]]


def _papilio(options: argparse.Namespace) -> Steps:
    """What `papilio train` does at each step, reporting and evaluation left out."""
    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

    from papilio.data_pipeline.dataset import open_dataset
    from papilio.data_pipeline.loading.loader import Loader
    from papilio.data_pipeline.logging_setup import setup_logging
    from papilio.trainer.config_file import build_config
    from papilio.trainer.optimizers import Optimizers
    from papilio.trainer.process_group import process_group
    from papilio.trainer.runtime import configure_runtime
    from papilio.trainer.sharded_model import build_sharded_model

    tree = {
        "name": "benchmark",
        "data": {"path": options.data},
        "model": {"dense_arch_layer_sizes": LAYERS["dense"], "over_arch_layer_sizes": LAYERS["over"]},
        "optimizer": {
            "sparse": {"name": options.sparse_optimizer, "learning_rate": LEARNING_RATE},
            "dense": {"name": "sgd", "learning_rate": LEARNING_RATE},
        },
        "sharding": {"types": ["table_wise"]},
        "train": {"precision": "fp32" if options.worker == "papilio_fp32" else "bf16"},
    }
    config = build_config(tree, source="benchmark")
    group = process_group()
    ranks = group.__enter__()
    setup_logging("rank")
    configure_runtime()
    dataset = open_dataset(options.data)
    loader = Loader(
        dataset,
        "train",
        config.data,
        global_batch_size=GLOBAL_BATCH_SIZE,
        num_epochs=1000,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    model = build_sharded_model(config, dataset, ranks)
    optimizers = Optimizers(model.module, config.optimizer, config.schedule)
    pipeline = TrainPipelineSparseDist(model.module, optimizers.combined, ranks.device, execute_all_batches=True)
    batches = iter(loader)

    def finish() -> None:
        batches.close()
        group.__exit__(None, None, None)

    return lambda: pipeline.progress(batches), finish


class _RowBatches:
    """The samples of the first shard as [N, I] and [N, F] arrays, sliced and copied into tensors at each step."""

    def __init__(self, data: str) -> None:
        import numpy as np

        from papilio.data_pipeline.dataset import open_dataset

        self.dataset = open_dataset(data)
        columns = self.dataset.open_split("train").shard(0)
        self.dense = np.array(columns.dense)
        self.sparse = np.stack([bags.ids for bags in columns.bags], axis=1)
        self.labels = np.array(columns.labels)
        self.num_embeddings = list(self.dataset.num_embeddings.values())
        self.next_row = torch.distributed.get_rank() * len(self.labels) // NUM_RANKS

    def next_slice(self) -> slice:
        size = GLOBAL_BATCH_SIZE // NUM_RANKS
        start = self.next_row if self.next_row + size <= len(self.labels) else 0
        self.next_row = start + size
        return slice(start, start + size)


def _plain_torchrec(options: argparse.Namespace) -> Steps:
    """TorchRec as its own DLRM example is written: fp32, EBC, planner, DMP, fused optimizer, batches built per step."""
    import torchrec
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
    from torchrec.datasets.utils import Batch
    from torchrec.distributed import DistributedModelParallel
    from torchrec.models.dlrm import DLRM, DLRMTrain
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
    from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
    from torchrec.optim.optimizers import in_backward_optimizer_filter

    torch.distributed.init_process_group("gloo")
    rows = _RowBatches(options.data)
    names = rows.dataset.schema.categorical_names
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=EMBEDDING_DIM, num_embeddings=count, feature_names=[name])
        for name, count in zip(names, rows.num_embeddings, strict=True)
    ]
    ebc = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    dlrm = DLRM(ebc, 13, [*LAYERS["dense"], EMBEDDING_DIM], [*LAYERS["over"], 1])
    model = DLRMTrain(dlrm)
    optimizer_class = torchrec.optim.SGD if options.sparse_optimizer == "sgd" else torchrec.optim.RowWiseAdagrad
    apply_optimizer_in_backward(optimizer_class, model.model.sparse_arch.parameters(), {"lr": LEARNING_RATE})
    sharded = DistributedModelParallel(model, device=torch.device("cpu"))
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(sharded.named_parameters())),
        lambda parameters: torch.optim.SGD(parameters, lr=LEARNING_RATE),
    )
    optimizer = CombinedOptimizer([sharded.fused_optimizer, dense])

    def step() -> None:
        part = rows.next_slice()
        size = part.stop - part.start
        features = KeyedJaggedTensor.from_lengths_sync(
            names,
            torch.from_numpy(rows.sparse[part].transpose(1, 0).reshape(-1)),
            torch.ones(len(names) * size, dtype=torch.int32),
        )
        batch = Batch(torch.from_numpy(rows.dense[part]), features, torch.from_numpy(rows.labels[part]))
        optimizer.zero_grad()
        loss, _ = sharded(batch)
        loss.backward()
        optimizer.step()

    return step, torch.distributed.destroy_process_group


def _plain_pytorch(options: argparse.Namespace) -> Steps:
    """nn.EmbeddingBag(sparse=True) tables on every rank, SGD, DDP over gloo."""
    torch.distributed.init_process_group("gloo")
    rows = _RowBatches(options.data)
    model = torch.nn.parallel.DistributedDataParallel(_PlainDLRM(rows.num_embeddings))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    loss_function = torch.nn.BCEWithLogitsLoss()

    def step() -> None:
        part = rows.next_slice()
        dense = torch.from_numpy(rows.dense[part])
        ids = torch.from_numpy(rows.sparse[part]).long()
        labels = torch.from_numpy(rows.labels[part]).float()
        optimizer.zero_grad()
        loss_function(model(dense, ids).squeeze(1), labels).backward()
        optimizer.step()

    return step, torch.distributed.destroy_process_group


class _PlainDLRM(torch.nn.Module):
    def __init__(self, num_embeddings: list[int]) -> None:
        super().__init__()
        self.tables = torch.nn.ModuleList(
            torch.nn.EmbeddingBag(count, EMBEDDING_DIM, mode="sum", sparse=True) for count in num_embeddings
        )
        num_vectors = len(num_embeddings) + 1
        pairs = torch.tril_indices(num_vectors, num_vectors, offset=-1)
        self.register_buffer("pairs", pairs, persistent=False)
        self.bottom = _layers(13, [*LAYERS["dense"], EMBEDDING_DIM], last_relu=True)
        self.top = _layers(EMBEDDING_DIM + pairs.shape[1], [*LAYERS["over"], 1], last_relu=False)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        bottom = self.bottom(dense)
        pooled = [table(ids[:, index : index + 1]) for index, table in enumerate(self.tables)]
        vectors = torch.stack([bottom, *pooled], dim=1)
        dots = torch.bmm(vectors, vectors.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([bottom, dots], dim=1))


def _layers(in_features: int, sizes: list[int], *, last_relu: bool) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for index, size in enumerate(sizes):
        layers.append(torch.nn.Linear(in_features, size))
        in_features = size
        if last_relu or index < len(sizes) - 1:
            layers.append(torch.nn.ReLU())
    return torch.nn.Sequential(*layers)


if __name__ == "__main__":
    main()
