"""2D parallelism: groups of ranks that each hold all tables, averaged now and then (TorchRec's DMPCollection).

TorchRec's class asserts a GPU, places shards at cpu:<index>, averages with an operation that gloo lacks, and averages
the optimizer state of the Adagrad family only. Ours does without these on a CPU, and averages every kind of state on
both; on a GPU the rest is TorchRec's own.

A group's tables get the gradient of its own samples as if these were the whole batch: the all-to-all averages over the
group's ranks only, while the loss is scaled for all ranks (trainer/models/train_model.py). Averaged over the groups
after every step, that is for SGD the step of the whole batch on one copy of the tables.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import DataParallelWrapper, DMPCollection, ShardingStrategy
from torchrec.distributed.types import DMPCollectionContext, ModuleSharder, ShardingEnv2D, ShardingPlan

from papilio.sharding.compat.torch_internals import cpu_of_rank


class ReplicatedModelParallel(DMPCollection):  # type: ignore[misc]  # torchrec has no type information
    """A model whose tables are sharded over each group of `group_size` contiguous ranks; the dense part is one."""

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        plan: ShardingPlan,
        group_size: int,
        world: dist.ProcessGroup,
        sharders: list[ModuleSharder[nn.Module]],
        data_parallel_wrapper: DataParallelWrapper,
    ) -> None:
        """Shard. Collective.

        Args:
            module: the model, its tables on meta.
            device: where to.
            plan: for ranks 0 to `group_size` - 1; changed in place to the ranks of the own group.
            group_size: ranks of a group; divides the number of ranks.
            world: all ranks.
            sharders: as DistributedModelParallel takes them.
            data_parallel_wrapper: likewise.
        """
        if device.type == "cuda":
            super().__init__(
                module,
                device,
                plan,
                dist.get_world_size(world),
                group_size,
                world,
                sharders=sharders,
                data_parallel_wrapper=data_parallel_wrapper,
                use_inter_host_allreduce=True,
            )
            return
        self._shard_on_cpu(module, device, plan, group_size, world, sharders, data_parallel_wrapper)

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The ranks over which the own copy of the tables is spread."""
        group: dist.ProcessGroup = self._default_ctx.sharding_pg
        return group

    @property
    def group_index(self) -> int:
        """Number of the own group, from 0."""
        return int(self.device_mesh.get_coordinate()[0])

    def _shard_on_cpu(
        self,
        module: nn.Module,
        device: torch.device,
        plan: ShardingPlan,
        group_size: int,
        world: dist.ProcessGroup,
        sharders: list[ModuleSharder[nn.Module]],
        data_parallel_wrapper: DataParallelWrapper,
    ) -> None:
        """Do what DMPCollection.__init__ does, without its assertion."""
        world_size, rank = dist.get_world_size(world), dist.get_rank(world)
        self._device, self._pg, self._global_rank = device, world, rank
        self._sharder_map = {sharder.module_type: sharder for sharder in sharders}
        context = DMPCollectionContext(
            module=None,
            plan=plan,
            sharding_group_size=group_size,
            node_group_size=None,
            use_inter_host_allreduce=True,
            sharding_strategy=ShardingStrategy.DEFAULT,
        )
        self._default_ctx, self._ctxs = context, [context]
        self._submodule_ctxs: list[DMPCollectionContext] = []
        context.device_mesh, context.sharding_pg, context.replica_pg = self._create_process_groups(
            rank, world_size, group_size, use_inter_host_allreduce=True
        )
        self._remap_sharding_plan(plan, rank, world_size // group_size, group_size, use_inter_host_allreduce=True)
        environment = ShardingEnv2D(
            global_pg=world,
            sharding_pg=context.sharding_pg,
            replica_pg=context.replica_pg,
            device_mesh=context.device_mesh,
            node_group_size=None,
            use_inter_host_allreduce=True,
            sharding_strategy=ShardingStrategy.DEFAULT,
        )
        self._custom_all_reduce = self._average
        self._use_sharded_relay, self._sharded_relay_state = False, None
        DistributedModelParallel.__init__(
            self, module, environment, device, plan, sharders, True, True, data_parallel_wrapper
        )
        self._group_sharded_modules(self._ctxs)
        self._cache_sync_tensors(self._ctxs)

    def _average(self, tensors: list[torch.Tensor]) -> None:
        """Average over the groups; gloo has no such operation, so sum and divide."""
        replicas = self._default_ctx.replica_pg
        replicas.allreduce_coalesced(tensors, opts=dist.AllreduceCoalescedOptions()).wait()
        for tensor in tensors:
            tensor.div_(dist.get_world_size(replicas))

    def _create_process_groups(self, *arguments: Any, **keywords: Any) -> Any:
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # every group it makes is a warning to TorchRec
        try:
            return super()._create_process_groups(*arguments, **keywords)
        finally:
            root.setLevel(level)

    def _remap_sharding_plan(self, plan: ShardingPlan, *arguments: Any, **keywords: Any) -> None:
        super()._remap_sharding_plan(plan, *arguments, **keywords)
        if self._device.type == "cpu":
            for module_plan in plan.plan.values():
                for sharding in module_plan.values():
                    for shard in sharding.sharding_spec.shards:
                        shard.placement = cpu_of_rank(shard.placement.rank())

    def _cache_sync_tensors(self, contexts: list[DMPCollectionContext]) -> None:
        """List what is averaged: all weights, and every optimizer state that is a sum or a mean of gradients."""
        for context in contexts:
            weights: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
            states: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
            for kernel, _ in context.modules_to_sync:
                if isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen):
                    for weight in kernel.split_embedding_weights():
                        weights[weight.dtype].append(weight)
                    for table_states in kernel.split_optimizer_states():
                        for state in table_states:
                            if state.is_floating_point() and state.numel():
                                states[state.dtype].append(state)
            context.weights_by_dtype, context.optimizer_tensors_by_dtype = dict(weights), dict(states)
            context.hash_zch_modules = []
