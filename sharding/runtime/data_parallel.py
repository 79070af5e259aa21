"""Tables that every rank holds whole (data_parallel)."""

from __future__ import annotations

from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardingType


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
