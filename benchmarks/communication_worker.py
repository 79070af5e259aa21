"""One rank of `benchmarks.communication`: errors of quantization, bytes in collectives, or AUC of whole runs.

One job for all variants, since starting ranks takes longer than a run.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from papilio.data_pipeline.dataset import open_dataset
from papilio.data_pipeline.loading.loader import Loader
from papilio.data_pipeline.logging_setup import setup_logging
from papilio.sharding.config import CommunicationConfig, ReplicasConfig, ShardingConfig
from papilio.sharding.hardware import load_hardware
from papilio.sharding.plan_conversion import to_sharding_plan
from papilio.sharding.plan_file import PlanFile
from papilio.sharding.planner.job import BYTES_PER_VALUE, Cluster, DenseWork, Job, Table
from papilio.sharding.planner.make import make_plan
from papilio.sharding.runtime.communication import make_codecs
from papilio.sharding.runtime.replicas import ReplicatedModelParallel
from papilio.trainer.config import Config, SparseOptimizerConfig
from papilio.trainer.config_file import load_config
from papilio.trainer.optimizers import fuse_sparse_optimizer
from papilio.trainer.process_group import Ranks, process_group
from papilio.trainer.runtime import configure_runtime
from papilio.trainer.sharded_model import build_sharded_model, shard
from papilio.trainer.train import train

NUM_STEPS = 4
NUM_TABLES, ROWS, DIM, LOCAL_BATCH = 8, 10_000, 64, 1_024
# FBGEMM's int8 has a scale and a bias of 4 bytes each to every 32 values.
WIRE_BYTES = {**BYTES_PER_VALUE, "int8": 1 + 8 / 32}
PAIRS = {
    "table_wise": [("fp16", "fp16"), ("fp32", "fp16"), ("int8", "fp16"), ("int8", "int8")],
    "column_wise": [("fp16", "fp16"), ("int8", "int8")],
    "row_wise": [("fp16", "fp16"), ("fp32", "fp16")],
}


def main() -> None:
    """Print a line of JSON from rank 0 for each list of settings, or for each pair of precisions."""
    kind, variants = sys.argv[1], json.loads(sys.argv[2])
    setup_logging("rank")
    configure_runtime()
    with process_group() as ranks:
        counter = _Counter() if kind == "bytes" else None
        for found in _errors(ranks) if kind == "errors" else (_of_variant(v, counter, ranks) for v in variants):
            if ranks.is_first:
                print(json.dumps(found), flush=True)


def _of_variant(settings: list[str], counter: _Counter | None, ranks: Ranks) -> dict[str, float]:
    config = load_config("quickstart", settings)
    return _auc(config, ranks) if counter is None else _bytes(config, counter, ranks)


def _auc(config: Config, ranks: Ranks) -> dict[str, float]:
    """Train once; the run's folder is removed."""
    with contextlib.redirect_stdout(io.StringIO()):
        summary = train(config, ranks)
    dist.barrier()
    if ranks.is_first:
        shutil.rmtree(summary.run_dir)
    return {"auc": summary.final["test"].auc}


class _Counter:
    """Counts the bytes of floating-point tensors that this rank sends to others through torch.distributed."""

    def __init__(self) -> None:
        self.embedding_bytes = 0
        self.averaging_bytes = 0.0
        self._wrap("all_to_all_single", _sent_all_to_all)

    def watch(self, model: ReplicatedModelParallel) -> None:
        """Count what the model's averagings send too."""
        stock = model._custom_all_reduce

        def average(tensors: list[torch.Tensor]) -> None:
            self.averaging_bytes += _ring_bytes(sum(t.nbytes for t in tensors), model._default_ctx.replica_pg.size())
            stock(tensors)

        model._custom_all_reduce = average

    def _wrap(self, name: str, count: Callable[[Any, Any], int]) -> None:
        stock = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.embedding_bytes += count(args, kwargs)
            return stock(*args, **kwargs)

        setattr(dist, name, counted)


def _sent_all_to_all(args: Any, kwargs: Any) -> int:
    sent = kwargs.get("input", args[1] if len(args) > 1 else None)
    splits = kwargs.get("input_split_sizes", args[3] if len(args) > 3 else None)
    if not _is_payload(sent):
        return 0
    group = kwargs.get("group", args[4] if len(args) > 4 else None)
    own = splits[dist.get_rank(group)] if splits else sent.shape[0] // dist.get_world_size(group)
    return int((sum(splits) - own if splits else sent.shape[0] - own) * sent[:1].nbytes)


def _ring_bytes(reduced_bytes: float, num_peers: int) -> float:
    """Bytes that each of the peers sends in a ring's all-reduce."""
    return 2 * (num_peers - 1) / num_peers * reduced_bytes


def _is_payload(tensor: torch.Tensor) -> bool:
    """Whether it is embeddings, quantized or not; ids and lengths are int32 and int64."""
    return tensor.is_floating_point() or tensor.dtype in {torch.uint8, torch.int8}


def _bytes(config: Config, counter: _Counter, ranks: Ranks) -> dict[str, float]:
    """Bytes that a rank sends in a step, mean over ranks."""
    counter.embedding_bytes, counter.averaging_bytes = 0, 0.0
    dataset = open_dataset(config.data.path)
    model = build_sharded_model(config, dataset, ranks)
    if isinstance(model.module, ReplicatedModelParallel):
        counter.watch(model.module)
    batch_size = config.train.global_batch_size
    loader = Loader(
        dataset, "train", config.data, global_batch_size=batch_size, rank=ranks.rank, world_size=ranks.world_size
    )
    batches = iter(loader)
    # Whole periods of averaging.
    num_steps = max(NUM_STEPS, config.sharding.replicas.sync_every_steps)
    for step in range(1, num_steps + 1):
        loss, _ = model.module(next(batches))
        loss.backward()
        model.average_replicas(step, before_use=False)
    sums = torch.tensor([counter.embedding_bytes, counter.averaging_bytes], dtype=torch.float64) / num_steps
    dist.all_reduce(sums)
    embedding_bytes, averaging_bytes = (sums / ranks.world_size).tolist()
    return {
        "embedding_bytes": embedding_bytes,
        "embedding_formula_bytes": embedding_formula_bytes(model.plan, config.sharding.communication),
        "averaging_bytes": averaging_bytes,
        "averaging_formula_bytes": averaging_formula_bytes(model.plan, config.sharding.replicas),
    }


def embedding_formula_bytes(plan: PlanFile, communication: CommunicationConfig) -> float:
    """Bytes that a rank sends in a step for whole tables: B D of each table to (G - 1) of G ranks, there and back.

    B samples of a rank, G ranks of a group; a rank sends its tables' vectors of G B samples to the others, which send
    the gradients back.
    """
    group = plan.machine.group_size
    samples = plan.global_batch_size / plan.machine.num_ranks
    total = 0.0
    all_columns = sum(table.embedding_dim for table in plan.tables)
    for rank in plan.ranks:
        own = sum(table.embedding_dim for table in plan.tables if table.ranks[0] == rank.rank)
        total += samples * (group - 1) * own * WIRE_BYTES[communication.forward]
        total += samples * (all_columns - own) * WIRE_BYTES[communication.backward]
    return total / len(plan.ranks)


def averaging_formula_bytes(plan: PlanFile, replicas: ReplicasConfig) -> float:
    """Bytes that a rank sends in a step to average R rows of D columns and row-wise Adagrad's state, R values, in fp32.

    Among n groups a ring's all-reduce sends 2 (n - 1) / n of it, once in `sync_every_steps`.
    """
    if replicas.independent_tables:
        return 0.0
    values = sum(table.num_embeddings * (table.embedding_dim + 1) for table in plan.tables)
    per_rank = 4 * values / plan.machine.group_size
    return 2 * (replicas.num_groups - 1) / replicas.num_groups * per_rank / replicas.sync_every_steps


class _Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(name=f"t_{i}", feature_names=[f"f_{i}"], num_embeddings=ROWS, embedding_dim=DIM)
            for i in range(NUM_TABLES)
        ]
        self.tables = EmbeddingBagCollection(tables, device=torch.device("meta"))

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        pooled = self.tables(features)
        return torch.cat([pooled[f"f_{i}"] for i in range(NUM_TABLES)], dim=1)


def _errors(ranks: Ranks) -> Iterator[dict[str, Any]]:
    """Relative errors (norm of the difference over the norm) against fp32, over all ranks."""
    for sharding_type, pairs in PAIRS.items():
        exact = _step(ranks, sharding_type, CommunicationConfig())
        for forward, backward in pairs:
            found = _step(
                ranks, sharding_type, CommunicationConfig.model_validate({"forward": forward, "backward": backward})
            )
            errors = [_relative(a, b) for a, b in zip(found, exact, strict=True)]
            yield {
                "type": sharding_type,
                "forward": forward,
                "backward": backward,
                "pooled": errors[0],
                "update": errors[1],
            }


def _step(ranks: Ranks, sharding_type: str, communication: CommunicationConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pooled embeddings, and the change of this rank's shards by a step of SGD with random gradients."""
    model = _Bags()
    fuse_sparse_optimizer(model.tables, SparseOptimizerConfig(name="sgd", learning_rate=1.0))
    tables = tuple(Table(f"t_{i}", "tables", f"f_{i}", ROWS, DIM) for i in range(NUM_TABLES))
    job = Job(tables, DenseWork((), 0, 0, 0, 0), 1, LOCAL_BATCH * ranks.world_size, communication=communication)
    cluster = Cluster(load_hardware("cpu_laptop"), 1, ranks.world_size)
    plan = make_plan(
        job,
        cluster,
        ShardingConfig.model_validate({"types": [sharding_type], "min_partition": 32}),
        recipe="benchmark",
        papilio_version="",
    )
    sharded = shard(
        model, to_sharding_plan(plan, ranks.device), ranks.device, codecs=make_codecs(communication, ranks.device)
    )
    generator = torch.Generator().manual_seed(5)
    shards = []
    with torch.no_grad():
        for weight in sharded.state_dict().values():
            whole = torch.randn(ROWS, DIM, generator=generator) * 0.1
            for part in weight.local_shards():
                row, column = part.metadata.shard_offsets
                num_rows, num_columns = part.tensor.shape
                start = whole[row : row + num_rows, column : column + num_columns]
                part.tensor.copy_(start)
                shards.append((part.tensor, start))
    own = torch.Generator().manual_seed(100 + ranks.rank)
    ids = torch.randint(0, ROWS, (NUM_TABLES * LOCAL_BATCH,), generator=own).int()
    features = KeyedJaggedTensor(
        [f"f_{i}" for i in range(NUM_TABLES)], ids, lengths=torch.ones(NUM_TABLES * LOCAL_BATCH).int()
    )
    pooled = sharded(features)
    # Gradients as a click model has them: small, and of very different sizes from sample to sample.
    gradient = torch.randn(LOCAL_BATCH, NUM_TABLES * DIM, generator=own) / LOCAL_BATCH
    (pooled * gradient * torch.rand(LOCAL_BATCH, 1, generator=own)).sum().backward()
    changes = [(tensor - start).flatten() for tensor, start in shards]
    return pooled.detach(), torch.cat(changes) if changes else torch.zeros(0)


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    sums = torch.stack([(found - exact).square().sum(), exact.square().sum()])
    dist.all_reduce(sums)
    return float((sums[0] / sums[1]).sqrt())


if __name__ == "__main__":
    main()
