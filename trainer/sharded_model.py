"""From config and data set to a model sharded over the ranks: the part that training and evaluation share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper
from torchrec.distributed.types import QuantizedCommCodecs, ShardingPlan
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from papilio.data_pipeline.dataset import Dataset
from papilio.data_pipeline.loading.batch import Batch
from papilio.data_pipeline.loading.order import ReadPosition
from papilio.sharding.config import ReplicasConfig
from papilio.sharding.plan_conversion import to_sharding_plan
from papilio.sharding.plan_file import PlanFile
from papilio.sharding.runtime.communication import check_communication, make_codecs
from papilio.sharding.runtime.initial_weights import initialize_tables
from papilio.sharding.runtime.replicas import ReplicatedModelParallel
from papilio.sharding.runtime.rowwise_adagrad import speed_up_rowwise_adagrad
from papilio.sharding.runtime.sharders import BagSharder
from papilio.sharding.runtime.table_shards import set_optimizer_step
from papilio.trainer.config import Config
from papilio.trainer.models.build import build_model
from papilio.trainer.models.train_model import TrainModel
from papilio.trainer.optimizers import (
    Optimizers,
    check_data_parallel_tables,
    check_sparse_optimizer,
    fuse_sparse_optimizer,
)
from papilio.trainer.planner_inputs import describe_job, plan_for_ranks
from papilio.trainer.process_group import Ranks

# DDP with a static graph cuts anew in the forward pass after these.
NUM_PASSES = 2


@dataclass(frozen=True)
class ShardedModel:
    """`module` computes a step on this rank's shards (see `TrainModel`); `plan` says where all shards are."""

    module: DistributedModelParallel
    plan: PlanFile
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)

    @property
    def num_copies(self) -> int:
        """Copies of the tables that differ: one, or one for each group with independent tables."""
        return self.replicas.num_groups if self.replicas.independent_tables else 1

    @property
    def group_index(self) -> int:
        """Number of this rank's group, from 0."""
        return self.module.group_index if isinstance(self.module, ReplicatedModelParallel) else 0

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The ranks that one copy of the tables is spread over; None: all."""
        return self.module.shard_group if isinstance(self.module, ReplicatedModelParallel) else None

    def average_replicas(self, step: int, *, before_use: bool) -> None:
        """Average the groups' tables if that is due after `step`, or before they are evaluated or saved. Collective.

        Between two averagings the groups' tables differ: an evaluation would measure another model on each slice.
        """
        is_due = step % self.replicas.sync_every_steps == 0 or before_use
        if isinstance(self.module, ReplicatedModelParallel) and is_due and not self.replicas.independent_tables:
            self.module.sync()

    @property
    def num_parameters(self) -> int:
        """Weights over all ranks."""
        return sum(math.prod(weight.size()) for weight in self.module.state_dict().values())


def build_sharded_model(config: Config, dataset: Dataset, ranks: Ranks) -> ShardedModel:
    """Build, plan, check the plan, shard and initialize. Collective.

    Raises:
        ConfigError: the recipe does not fit the data set, the device or the plan.
        PlanError: the tables do not fit the ranks.
    """
    check_sparse_optimizer(config.optimizer.sparse, ranks.device)
    model = build_model(config.model, dataset, ranks.device, config.seed)
    fuse_sparse_optimizer(model.embedding_bag_collection, config.optimizer.sparse)
    autocast_dtype = torch.bfloat16 if config.train.precision == "bf16" else None
    step_model = TrainModel(model, ranks.world_size, autocast_dtype, ranks.device.type)
    job = describe_job(
        step_model,
        dataset,
        train=config.train,
        optimizer=config.optimizer,
        sharding=config.sharding,
        data=config.data,
        checkpoint=config.checkpoint,
    )
    plan = plan_for_ranks(job, config.sharding, config.name, ranks)
    data_parallel = [table.name for table in plan.tables if table.sharding_type == "data_parallel"]
    check_data_parallel_tables(data_parallel, config.optimizer.sparse, config.model.table_precision)
    check_communication(config.sharding.communication, plan, ranks.device)
    codecs = make_codecs(config.sharding.communication, ranks.device)
    group_size = plan.machine.group_size
    module = shard(step_model, to_sharding_plan(plan, ranks.device), ranks.device, codecs=codecs, group_size=group_size)
    initialize_tables(module, config.seed)
    return ShardedModel(module, plan, config.sharding.replicas)


def shard(
    model: nn.Module,
    plan: ShardingPlan,
    device: torch.device,
    *,
    codecs: dict[str, QuantizedCommCodecs] | None = None,
    group_size: int | None = None,
) -> DistributedModelParallel:
    """Allocate the planned shards on this rank and wrap the dense part in DDP. Collective.

    Args:
        model: its tables on meta.
        plan: for ranks 0 to `group_size` - 1.
        device: where to.
        codecs: what travels in fewer bits (see `make_codecs`).
        group_size: ranks of a group that holds all tables; None: all ranks are one group.
    """
    wrapper = DefaultDataParallelWrapper(static_graph=True)
    sharders = [BagSharder(qcomm_codecs_registry=codecs)]
    world = dist.group.WORLD
    if world is not None and group_size is not None and group_size < world.size():
        module = ReplicatedModelParallel(model, device, plan, group_size, world, sharders, wrapper)
    else:
        module = DistributedModelParallel(
            model, device=device, plan=plan, sharders=sharders, data_parallel_wrapper=wrapper
        )
    speed_up_rowwise_adagrad(module)
    return module


def fix_gradient_buckets(model: ShardedModel, optimizers: Optimizers, dataset: Dataset, ranks: Ranks) -> None:
    """Run the passes after which DDP keeps its buckets, on padding alone, which changes no weight. Collective.

    It makes sums of gradients independent of when a process was started. DDP cuts the dense gradients into buckets, and
    after its first two backward passes cuts them anew, in the order in which they became ready. Where a gradient lies
    in its bucket decides the order in which a ring adds up the ranks' parts of it. From three ranks on the first two
    steps of a process therefore round otherwise than any later ones, and a job that resumes from a checkpoint would end
    a few bits off one that never stopped (1e-6 after 324 steps on 4 ranks, torch 2.13).
    """
    batch = _padding(dataset).to(ranks.device)
    model.module.train()
    for _ in range(NUM_PASSES):
        loss, _output = model.module(batch)
        loss.backward()
        optimizers.combined.zero_grad()
    # The fused optimizers have counted the passes.
    set_optimizer_step(model.module, 0)


def _padding(dataset: Dataset) -> Batch:
    """A batch of one row that is no sample: zeros and empty bags."""
    keys = dataset.schema.categorical_names
    features = KeyedJaggedTensor(
        keys=keys,
        values=torch.empty(0, dtype=torch.int32),
        lengths=torch.zeros(len(keys), dtype=torch.int32),
        stride=1,
        length_per_key=[0] * len(keys),
        offset_per_key=[0] * (len(keys) + 1),
    )
    dense = torch.zeros(1, len(dataset.schema.dense))
    return Batch(dense, features, torch.zeros(1), ReadPosition(), global_batch_size=1, num_samples=0)
