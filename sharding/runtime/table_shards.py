"""What this rank holds of the tables: rectangles of weights with their optimizer state, whatever the sharding type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardingType

from papilio.sharding.compat.torch_internals import ShardMetadata
from papilio.sharding.compat.torchrec_internals import embedding_groups, lookups_of


@dataclass(frozen=True)
class TableShard:
    """Rows `row`... and columns `column`... of a table.

    Attributes:
        table: its name.
        weight: [rows, columns], the memory that is trained.
        states: the fused optimizer's state by name, [rows] (one value a row of these columns) or [rows, columns].
        parameter: name of the model's parameter, of a data_parallel table alone, whose optimizer is elsewhere.
    """

    table: str
    row: int
    column: int
    weight: torch.Tensor
    states: dict[str, torch.Tensor]
    parameter: str | None = None


@dataclass(frozen=True)
class TableLayout:
    """The whole of a table, and the first columns of its blocks of columns, which are trained apart."""

    num_rows: int
    dim: int
    column_starts: tuple[int, ...]


def table_layouts(model: nn.Module) -> dict[str, TableLayout]:
    """Return the layout of every table by name, the same on all ranks."""
    layouts = {}
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            for table, sharding in module.module_sharding_plan.items():
                if sharding.sharding_type == ShardingType.DATA_PARALLEL.value:
                    num_rows, dim = module.embedding_bags[table].weight.shape
                    layouts[table] = TableLayout(num_rows, dim, (0,))
                else:
                    layouts[table] = _layout_of(sharding.sharding_spec.shards)
    return layouts


def local_table_shards(model: nn.Module) -> list[TableShard]:
    """Return this rank's shards of all tables, shards without rows left out."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    shards: list[TableShard] = []
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            shards += _replicated_shards(module, names)
            shards += _fused_shards(module)
    return [shard for shard in shards if shard.weight.numel()]


def data_parallel_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of a sharded model's data_parallel tables by parameter name.

    TorchRec drops their fused optimizer without a word (torchrec issue 2394): their gradients are dense, averaged over
    the ranks by a DDP of their own, and wait for an optimizer step.
    """
    found = {
        id(bags.embedding_bags[name].weight)
        for bags in model.modules()
        if isinstance(bags, ShardedEmbeddingBagCollection)
        for name, sharding in bags.module_sharding_plan.items()
        if sharding.sharding_type == ShardingType.DATA_PARALLEL.value
    }
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in found}


def iterate_tbes(model: nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """Yield this rank's TBEs, sharded or not; TorchRec keeps the lookups of a sharded module out of `modules()`."""
    for module in model.modules():
        if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen):
            yield module
        if isinstance(module, ShardedEmbeddingBagCollection):
            for lookup in lookups_of(module):
                yield from iterate_tbes(lookup)


def set_optimizer_step(model: nn.Module, step: int) -> None:
    """Tell the fused optimizers how many steps they have done; Adam and LAMB correct their bias by it."""
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            for kernel, _ in _kernels(module):
                kernel.iter[0] = step


def _layout_of(shards: Sequence[ShardMetadata]) -> TableLayout:
    num_rows, dim = (max(shard.shard_offsets[i] + shard.shard_sizes[i] for shard in shards) for i in (0, 1))
    return TableLayout(num_rows, dim, tuple(sorted({shard.shard_offsets[1] for shard in shards})))


def _fused_shards(module: ShardedEmbeddingBagCollection) -> Iterator[TableShard]:
    for kernel, tables in _kernels(module):
        kernel.flush()  # Behind a cache (UVM) the host's rows may be older than the device's.
        states = _optimizer_states(kernel)
        for place, weight in enumerate(kernel.split_embedding_weights()):
            row, column = tables[place].local_metadata.shard_offsets
            own = {name: values[place] for name, values in states.items()}
            yield TableShard(tables[place].name, row, column, weight, own)


def _replicated_shards(module: ShardedEmbeddingBagCollection, names: dict[int, str]) -> Iterator[TableShard]:
    for table, sharding in module.module_sharding_plan.items():
        if sharding.sharding_type == ShardingType.DATA_PARALLEL.value:
            weight = module.embedding_bags[table].weight
            yield TableShard(table, 0, 0, weight, {}, names[id(weight)])


def _kernels(module: ShardedEmbeddingBagCollection) -> Iterator[tuple[SplitTableBatchedEmbeddingBagsCodegen, list]]:  # type: ignore[type-arg]
    """Yield each fused kernel with the TorchRec tables that it holds, in its order."""
    for lookup in lookups_of(module):
        for bags in embedding_groups(lookup):
            if isinstance(bags.emb_module, SplitTableBatchedEmbeddingBagsCodegen):
                yield bags.emb_module, bags.config.embedding_tables


def _optimizer_states(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> dict[str, list[torch.Tensor]]:
    """Return each state by FBGEMM's name for it, table by table; SGD has none."""
    by_table = kernel.split_optimizer_states()
    if not by_table or not by_table[0]:
        return {}
    names = [name for name in kernel.get_optimizer_state()[0] if name != "iter"]
    return {name: [states[place] for states in by_table] for place, name in enumerate(names)}
