"""From config and data set to a model sharded over the ranks: the part that training and evaluation share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper
from torchrec.distributed.types import ShardingPlan

from data_pipeline.dataset import Dataset
from sharding.initial_weights import initialize_tables
from sharding.plan_conversion import to_sharding_plan
from sharding.plan_file import PlanFile
from sharding.rowwise_adagrad import speed_up_rowwise_adagrad
from sharding.sharders import BagSharder
from trainer.config import Config
from trainer.models.build import build_model
from trainer.models.train_model import TrainModel
from trainer.optimizers import check_sparse_optimizer, fuse_sparse_optimizer
from trainer.planning import plan_run
from trainer.ranks import Ranks


@dataclass(frozen=True)
class ShardedModel:
    """`module` computes a step on this rank's shards (see `TrainModel`); `plan` says where all shards are."""

    module: DistributedModelParallel
    plan: PlanFile

    @property
    def num_parameters(self) -> int:
        """Weights over all ranks."""
        return sum(math.prod(weight.size()) for weight in self.module.state_dict().values())


def build_sharded_model(config: Config, dataset: Dataset, ranks: Ranks) -> ShardedModel:
    """Build, plan, check the plan, shard and initialize. Collective.

    Raises:
        ConfigError: the recipe does not fit the data set or the device.
        PlanError: the tables do not fit the ranks.
    """
    check_sparse_optimizer(config.optimizer.sparse, ranks.device)
    model = build_model(config.model, dataset, ranks.device, config.seed)
    fuse_sparse_optimizer(model.embedding_bag_collection, config.optimizer.sparse)
    autocast_dtype = torch.bfloat16 if config.train.precision == "bf16" else None
    step_model = TrainModel(model, ranks.world_size, autocast_dtype, ranks.device.type)
    plan = plan_run(config, dataset, step_model, ranks)
    module = shard(step_model, to_sharding_plan(plan, ranks.device), ranks.device)
    initialize_tables(module, config.seed)
    return ShardedModel(module, plan)


def shard(model: nn.Module, plan: ShardingPlan, device: torch.device) -> DistributedModelParallel:
    """Allocate the planned shards on this rank and wrap the dense part in DDP. Collective."""
    module = DistributedModelParallel(
        model,
        device=device,
        plan=plan,
        sharders=[BagSharder()],
        data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=True),
    )
    speed_up_rowwise_adagrad(module)
    return module
