"""Undocumented parts of FBGEMM: the CPU kernel of row-wise Adagrad, and what a TBE tells its kernels.

FBGEMM has no public form of the backward alone, nor of the bounds by which a kernel tells tables apart
(sharding/runtime/rowwise_adagrad.py and empty_shards.py say what is wrong with them).
"""

from __future__ import annotations

import torch
from torch import nn

from papilio.sharding.compat.private_name import PrivateName

NEEDED = (PrivateName("torch._ops.OpOverload", "_schema", "to see which arguments a kernel takes", is_assigned=True),)
# What sharding/runtime reads or replaces in a TBE on a CPU; no name is private, and none is documented.
TBE_ATTRIBUTES = (
    *("D_offsets", "current_device", "embedding_specs", "feature_table_map", "hash_size_cumsum", "max_D"),
    *("momentum1_offsets", "optimizer", "optimizer_args", "output_dtype", "pooling_mode", "total_hash_size_bits"),
    *("weights_host", "weights_offsets", "weights_placements", "weights_precision"),
)
# The arguments that sharding/runtime/rowwise_adagrad.py passes, in this order.
ROWWISE_ADAGRAD_ARGUMENTS = (
    *("grad_output", "host_weights", "weights_placements", "weights_offsets", "D_offsets", "max_D"),
    *("hash_size_cumsum", "total_hash_size_bits", "indices", "offsets", "pooling_mode", "indice_weights"),
    *("stochastic_rounding", "momentum1_host", "momentum1_placements", "momentum1_offsets"),
    *("learning_rate_tensor", "eps"),
)


def rowwise_adagrad_arguments() -> tuple[str, ...]:
    """Return the names of what the CPU backward of row-wise Adagrad takes; they change with FBGEMM's releases."""
    backward = torch.ops.fbgemm.split_embedding_backward_codegen_rowwise_adagrad_cpu.default
    return tuple(argument.name for argument in backward._schema.arguments)


def tbe_lacks(tbe: nn.Module) -> tuple[str, ...]:
    """Return which of `TBE_ATTRIBUTES` a kernel has not."""
    return tuple(name for name in TBE_ATTRIBUTES if not hasattr(tbe, name))
