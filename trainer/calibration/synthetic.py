"""Models and batches of chosen shape, sharded and trained as real ones are: what calibration and studies measure."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from papilio.data_pipeline.loading.batch import Batch
from papilio.data_pipeline.loading.order import ReadPosition
from papilio.data_pipeline.version import papilio_version
from papilio.sharding.config import ShardingConfig
from papilio.sharding.plan_conversion import to_sharding_plan
from papilio.sharding.plan_file import PlanFile, StepPrediction
from papilio.sharding.planner.cost import PHASES, predict_step, shard_seconds
from papilio.sharding.planner.job import Cluster, DenseWork, Job, Table
from papilio.sharding.planner.options import Option
from papilio.sharding.planner.planner import chosen_options, prepare, solve, write_plan
from papilio.sharding.planner.search import SearchFailure
from papilio.sharding.runtime.initial_weights import initialize_tables
from papilio.trainer.config import (
    DenseOptimizerConfig,
    OptimizerConfig,
    ScheduleConfig,
    SparseOptimizerConfig,
    table_name,
)
from papilio.trainer.models.dlrm import DLRM
from papilio.trainer.models.train_model import TrainModel
from papilio.trainer.optimizers import Optimizers, fuse_sparse_optimizer
from papilio.trainer.process_group import Ranks
from papilio.trainer.sharded_model import shard

TABLES_MODULE = "model.embedding_bag_collection"
NUM_BATCHES = 8


@dataclass(frozen=True)
class Shape:
    """A DLRM and its batches; tables and pooling factors in the same order.

    Attributes:
        rows: of each table.
        pooling_factors: ids of each bag; all bags of a feature have as many.
        dim: columns of all tables.
        num_dense: dense inputs.
        bottom: hidden layers of the bottom MLP.
        top: hidden layers of the top MLP.
        global_batch_size: samples of a step over all ranks.
        sparse_optimizer: as in a recipe.
        dense_optimizer: as in a recipe.
        precision: of the dense part.
    """

    rows: tuple[int, ...]
    pooling_factors: tuple[int, ...]
    dim: int = 16
    num_dense: int = 13
    bottom: tuple[int, ...] = (512, 256)
    top: tuple[int, ...] = (512, 256)
    global_batch_size: int = 2048
    sparse_optimizer: str = "rowwise_adagrad"
    dense_optimizer: str = "adagrad"
    precision: str = "fp32"

    @property
    def features(self) -> list[str]:
        """Names of the features."""
        return [f"c{index}" for index in range(len(self.rows))]

    def job(self) -> Job:
        """Return the step as the planner sees it."""
        tables = tuple(
            Table(table_name(feature), TABLES_MODULE, feature, rows, self.dim, pooling_factor=factor)
            for feature, rows, factor in zip(self.features, self.rows, self.pooling_factors, strict=True)
        )
        return Job(
            tables=tables,
            dense=self._dense_work(),
            num_dense_features=self.num_dense,
            global_batch_size=self.global_batch_size,
            precision=self.precision,
            sparse_optimizer=self.sparse_optimizer,
            dense_optimizer=self.dense_optimizer,
        )

    def _dense_work(self) -> DenseWork:
        num_vectors = len(self.rows) + 1
        num_interacted = self.dim + num_vectors * (num_vectors - 1) // 2
        layers = (
            *itertools.pairwise((self.num_dense, *self.bottom, self.dim)),
            *itertools.pairwise((num_interacted, *self.top, 1)),
        )
        return DenseWork(
            layers=layers,
            num_parameters=sum(inputs * outputs + outputs for inputs, outputs in layers),
            num_interacting=num_vectors,
            interaction_dim=self.dim,
            activation_values=sum(map(sum, layers)) + num_vectors * self.dim + num_vectors**2,
        )


@dataclass(frozen=True)
class PlannedShape:
    """A shape under a plan; `chosen` has each table's option and the ranks of its shards."""

    shape: Shape
    plan: PlanFile
    chosen: tuple[tuple[Option, NDArray[np.int64]], ...]

    def predict(self, cluster: Cluster) -> StepPrediction:
        """Predict the step with the rates of `cluster`, whatever the plan was made with."""
        job = self.shape.job()
        phases_WP = np.zeros((cluster.group_size, len(PHASES)))
        for option, holders in self.chosen:
            phases_WP[holders] += shard_seconds(option, job, cluster)
        return predict_step(phases_WP, [option for option, _ in self.chosen], job, cluster)


def plan_shape(shape: Shape, config: ShardingConfig, cluster: Cluster) -> PlannedShape | None:
    """Plan a shape as the config asks; None where it does not fit."""
    planning = prepare(shape.job(), cluster, config)
    solution = solve(planning)
    if isinstance(solution, SearchFailure):
        return None
    plan = write_plan(planning, solution, recipe="synthetic", papilio_version=papilio_version())
    return PlannedShape(shape, plan, tuple(chosen_options(planning, solution).values()))


class SyntheticTraining:
    """A model of some shape under some plan, ready to be stepped. Building and stepping are collective."""

    def __init__(self, shape: Shape, plan: PlanFile, ranks: Ranks, seed: int = 0) -> None:
        self._ranks = ranks
        model = TrainModel(
            build_dlrm(shape, ranks.device, seed),
            ranks.world_size,
            torch.bfloat16 if shape.precision == "bf16" else None,
            ranks.device.type,
        )
        sparse = SparseOptimizerConfig.model_validate({"name": shape.sparse_optimizer})
        dense = DenseOptimizerConfig.model_validate({"name": shape.dense_optimizer})
        fuse_sparse_optimizer(model.model.embedding_bag_collection, sparse)
        module = shard(model, to_sharding_plan(plan, ranks.device), ranks.device)
        initialize_tables(module, seed)
        module.train()
        self._optimizers = Optimizers(module, OptimizerConfig(sparse=sparse, dense=dense), ScheduleConfig())
        self._pipeline = TrainPipelineSparseDist(
            module, self._optimizers.combined, ranks.device, execute_all_batches=True
        )
        self._batches = itertools.cycle(list(_make_batches(shape, ranks, seed)))
        self._num_steps = 0

    def run(self, num_steps: int) -> float:
        """Train so many steps and return the mean seconds of one. Collective; alike on all ranks but for noise."""
        _synchronize(self._ranks)
        begin_s = time.perf_counter()
        for _ in range(num_steps):
            self._optimizers.set_step(self._num_steps)
            self._pipeline.progress(self._batches)
            self._num_steps += 1
        _synchronize(self._ranks)
        return (time.perf_counter() - begin_s) / num_steps

    def close(self) -> None:
        """Leave the model as it was before the pipeline took hold of it."""
        self._pipeline.detach()


def build_dlrm(shape: Shape, device: torch.device, seed: int) -> DLRM:
    """Build the model of a shape: tables on meta, the dense part on the device."""
    tables = [
        EmbeddingBagConfig(name=table_name(name), feature_names=[name], num_embeddings=rows, embedding_dim=shape.dim)
        for name, rows in zip(shape.features, shape.rows, strict=True)
    ]
    torch.manual_seed(seed)
    model = DLRM(
        embedding_bag_collection=EmbeddingBagCollection(tables, device=torch.device("meta")),
        feature_names=shape.features,
        dense_in_features=shape.num_dense,
        dense_arch_layer_sizes=shape.bottom,
        over_arch_layer_sizes=shape.top,
        embedding_dim=shape.dim,
    )
    for name, child in model.named_children():
        if name != "embedding_bag_collection":
            child.to(device)
    return model


def _make_batches(shape: Shape, ranks: Ranks, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1000 * seed + ranks.rank)
    size = ranks.slice_of(shape.global_batch_size)
    for _ in range(NUM_BATCHES):
        values = [
            torch.randint(rows, (size * factor,), generator=generator, dtype=torch.int32)
            for rows, factor in zip(shape.rows, shape.pooling_factors, strict=True)
        ]
        lengths = [torch.full((size,), factor, dtype=torch.int32) for factor in shape.pooling_factors]
        yield Batch(
            dense_features=torch.rand(size, shape.num_dense, generator=generator),
            sparse_features=KeyedJaggedTensor(
                keys=shape.features,
                values=torch.cat(values),
                lengths=torch.cat(lengths),
                stride=size,
                length_per_key=[size * factor for factor in shape.pooling_factors],
            ),
            labels=torch.randint(2, (size,), generator=generator).float(),
            position=ReadPosition(),
            global_batch_size=shape.global_batch_size,
            num_samples=size,
        ).to(ranks.device)


def _synchronize(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    dist.barrier(group=ranks.group)
