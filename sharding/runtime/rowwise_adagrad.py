"""Row-wise Adagrad at full speed on a CPU.

FBGEMM's CPU backward sends an fp32 table with one feature to a kernel it compiles at run time (src/SparseAdagrad.cc).
That kernel mixes legacy SSE instructions (movss, addss, divss, sqrtss) with AVX registers whose upper halves are in
use; on Xeons since Sapphire Rapids each such mix is a microcode assist of some 30 ns, about 500 ns a row, 5 times the
rest of the work (benchmarks/rowwise_adagrad_kernel.py measures both). A table that two features share goes to plain
C++ code without the mix. So the backward is told of a second feature for each table, zero columns wide and with
empty bags: the sums and the update rule are the same, in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn

from papilio.sharding.compat.fbgemm_internals import rowwise_adagrad_arguments
from papilio.sharding.runtime.table_shards import iterate_tbes


@dataclass(frozen=True)
class _Layout:
    """Arguments of the backward kernel, each table followed by its empty second feature (T tables, 2 T features)."""

    placements: torch.Tensor
    weights_offsets: torch.Tensor
    momentum_offsets: torch.Tensor
    column_offsets: torch.Tensor
    row_offsets: torch.Tensor


def speed_up_rowwise_adagrad(model: nn.Module) -> int:
    """Give this rank's fp32 row-wise Adagrad TBEs on the CPU the backward described above; returns how many."""
    num_changed = 0
    for tbe in iterate_tbes(model):
        if _is_eligible(tbe):
            _replace_backward(tbe)
            num_changed += 1
    return num_changed


def _is_eligible(tbe: SplitTableBatchedEmbeddingBagsCodegen) -> bool:
    return (
        # FBGEMM's older releases take the learning rate as a number.
        "learning_rate_tensor" in rowwise_adagrad_arguments()
        and tbe.optimizer == EmbOptimType.EXACT_ROWWISE_ADAGRAD
        and tbe.current_device.type == "cpu"
        and tbe.weights_precision == SparseType.FP32
        and tbe.output_dtype == SparseType.FP32.as_int()
        and tbe.pooling_mode in {PoolingMode.SUM, PoolingMode.MEAN}
        # Features that share a table do not take the slow kernel.
        and len(set(tbe.feature_table_map)) == len(tbe.feature_table_map)
        and all(spec[2:4] == (EmbeddingLocation.HOST, ComputeDevice.CPU) for spec in tbe.embedding_specs)
    )


def _replace_backward(tbe: SplitTableBatchedEmbeddingBagsCodegen) -> None:
    layout = _Layout(
        placements=tbe.weights_placements.repeat_interleave(2),
        weights_offsets=tbe.weights_offsets.repeat_interleave(2),
        momentum_offsets=tbe.momentum1_offsets.repeat_interleave(2),
        column_offsets=_with_empty_features(tbe.D_offsets, at_start=False),
        row_offsets=_with_empty_features(tbe.hash_size_cumsum, at_start=True),
    )
    anchor = torch.zeros((), requires_grad=True)  # makes autograd call the backward; it gets no gradient
    stock_forward = tbe.forward

    def forward(
        indices: torch.Tensor,
        offsets: torch.Tensor,
        per_sample_weights: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if per_sample_weights is not None or kwargs or not torch.is_grad_enabled():
            return stock_forward(indices, offsets, per_sample_weights, **kwargs)  # type: ignore[no-any-return]
        arguments = (anchor, tbe, layout, stock_forward, indices.long(), offsets.long())
        return _Lookup.apply(*arguments)  # type: ignore[no-untyped-call,no-any-return]

    tbe.forward = forward


def _with_empty_features(bounds: torch.Tensor, *, at_start: bool) -> torch.Tensor:
    """Double the features of `bounds` [T + 1]: the second of each pair is empty, and stands at its start or its end."""
    first, second = bounds[:-1], bounds[:-1] if at_start else bounds[1:]
    return torch.cat([torch.stack([first, second], dim=1).flatten(), bounds[-1:]])


class _Lookup(torch.autograd.Function):
    """The TBE's own forward, with the backward kernel called on the doubled features."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        tbe: SplitTableBatchedEmbeddingBagsCodegen,
        layout: _Layout,
        stock_forward: Any,
        indices: torch.Tensor,
        offsets: torch.Tensor,
    ) -> torch.Tensor:
        pooled = stock_forward(indices, offsets)
        ctx.tbe, ctx.layout = tbe, layout
        # After the forward: its bounds check may have fixed indices in place.
        ctx.save_for_backward(indices, offsets)
        return pooled  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[None, ...]:
        tbe, layout = ctx.tbe, ctx.layout
        indices, offsets = ctx.saved_tensors
        if not indices.numel():
            return (None,) * 6
        torch.ops.fbgemm.split_embedding_backward_codegen_rowwise_adagrad_cpu(
            grad_outputs[0].contiguous(),
            tbe.weights_host,
            layout.placements,
            layout.weights_offsets,
            layout.column_offsets,
            tbe.max_D,
            layout.row_offsets,
            tbe.total_hash_size_bits,
            indices,
            _with_empty_bags(offsets, num_tables=tbe.weights_offsets.numel()),
            tbe.pooling_mode.value,
            torch.empty(0),  # no per-sample weights
            False,  # stochastic rounding
            tbe.momentum1_host,
            layout.placements,
            layout.momentum_offsets,
            tbe.learning_rate_tensor,
            tbe.optimizer_args.eps,
        )
        return (None,) * 6


def _with_empty_bags(offsets: torch.Tensor, num_tables: int) -> torch.Tensor:
    """Insert B empty bags after each table's B bags; `offsets` is [T B + 1]."""
    batch_size = (offsets.numel() - 1) // num_tables
    bags_TB = offsets[:-1].view(num_tables, batch_size)
    ends_T1 = offsets[batch_size::batch_size, None]
    doubled = torch.stack([bags_TB, ends_T1.expand(num_tables, batch_size)], dim=1)
    return torch.cat([doubled.flatten(), offsets[-1:]])
