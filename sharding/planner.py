"""From tables and machine to a plan, checked before anything is allocated."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingPlan

from sharding.config import ShardingConfig
from sharding.sharders import BagSharder

GIB = 1 << 30


class PlanError(ValueError):
    """Tables that cannot be placed; the message names the table or the memory, and the mend."""


def make_plan(
    model: nn.Module,
    config: ShardingConfig,
    *,
    device: torch.device,
    local_world_size: int,
    local_batch_size: int,
    group: dist.ProcessGroup,
) -> ShardingPlan:
    """Plan the tables of `model` with TorchRec's planner. Collective: every rank calls this, every rank gets the plan.

    Args:
        model: holds `EmbeddingBagCollection`s on meta; nothing of it is changed.
        config: allowed sharding types and memory.
        device: where tables will live ("cpu" or "cuda").
        local_world_size: ranks of a host.
        local_batch_size: samples of a rank and step, which decide the size of activations.
        group: all ranks.

    Raises:
        PlanError: a table named in the config does not exist, or the tables do not fit.
    """
    tables = dict(_tables_of(model))
    topology = Topology(
        world_size=dist.get_world_size(group),
        local_world_size=local_world_size,
        compute_device=device.type,
        hbm_cap=_memory_bytes(config, device) if device.type == "cuda" else None,
        ddr_cap=_memory_bytes(config, torch.device("cpu")) // (local_world_size if device.type == "cpu" else 1),
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=max(1, local_batch_size),
        storage_reservation=FixedPercentageStorageReservation(percentage=config.reserve_fraction),
        constraints=_constraints(config, tables),
    )
    try:
        plan = planner.collective_plan(model, [BagSharder()], group)
    except (PlannerError, RuntimeError) as error:
        raise PlanError(_explain(error, tables, topology, config)) from error
    check_plan(plan, tables)
    return plan


def check_plan(plan: ShardingPlan, tables: dict[str, EmbeddingBagConfig]) -> None:
    """Check that each table is placed exactly once and that its shards cover its rows and columns exactly.

    Raises:
        PlanError: naming the table.
    """
    placed: dict[str, int] = {}
    for module_plan in plan.plan.values():
        for name, sharding in module_plan.items():
            placed[name] = placed.get(name, 0) + 1
            table = tables[name]
            covered = sum(rows * columns for rows, columns in (s.shard_sizes for s in sharding.sharding_spec.shards))
            if covered != table.num_embeddings * table.embedding_dim:
                raise PlanError(f"the plan covers {covered} of the weights of table {name}, not all of them just once")
    for name in tables:
        if placed.get(name, 0) != 1:
            raise PlanError(f"the plan places table {name} {placed.get(name, 0)} times; it must be placed once")


def _tables_of(model: nn.Module) -> Iterator[tuple[str, EmbeddingBagConfig]]:
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            yield from ((table.name, table) for table in module.embedding_bag_configs())


def _constraints(config: ShardingConfig, tables: dict[str, EmbeddingBagConfig]) -> dict[str, ParameterConstraints]:
    for name in config.table_types:
        if name not in tables:
            nearest = difflib.get_close_matches(name, list(tables), n=1)
            mend = f"did you mean {nearest[0]}?" if nearest else f"tables: {', '.join(tables)}"
            raise PlanError(f"sharding.table_types.{name}: there is no such table; {mend}")
    return {
        name: ParameterConstraints(
            sharding_types=[config.table_types[name]] if name in config.table_types else list(config.types),
            min_partition=min(config.min_partition, table.embedding_dim),
        )
        for name, table in tables.items()
    }


def _memory_bytes(config: ShardingConfig, device: torch.device) -> int:
    if config.memory_per_rank_gib is not None:
        return int(config.memory_per_rank_gib * GIB)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _explain(
    error: Exception, tables: dict[str, EmbeddingBagConfig], topology: Topology, config: ShardingConfig
) -> str:
    weights_bytes = sum(4 * table.num_embeddings * table.embedding_dim for table in tables.values())
    largest = max(tables.values(), key=lambda table: table.num_embeddings * table.embedding_dim)
    storage = topology.devices[0].storage
    free_bytes = storage.hbm if topology.compute_device == "cuda" else storage.ddr
    return (
        f"the tables do not fit: {weights_bytes / GIB:.2f} GiB of weights over {topology.world_size} rank(s) of "
        f"{free_bytes / GIB:.2f} GiB each, of which {config.reserve_fraction:.0%} is kept free; the largest table, "
        f"{largest.name}, needs {4 * largest.num_embeddings * largest.embedding_dim / GIB:.2f} GiB. Allow row_wise in "
        f"sharding.types, lower sharding.reserve_fraction, use more ranks or a smaller model.embedding_dim. "
        f"(TorchRec's planner: {str(error).strip().splitlines()[0]})"
    )
