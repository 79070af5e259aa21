"""How dense and pooled vectors meet, for training and for serving. Needs no torchrec.

The pairwise dot products of DLRM (Naumov et al., arXiv 1906.00091), and the low-rank cross layers of DCNv2 (Wang et
al., arXiv 2008.13535).

B batch, D embedding dim, N = F + 1 vectors: the dense one and the F features', P = N (N - 1) / 2 pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Pairs:
    """Which products of N vectors count, and where: P = N (N - 1) / 2.

    Attributes:
        picked: [P] int64, places in the flattened N x N products.
        places: [N * N] int64, for each product its place among the picked ones, P for those with itself.
    """

    picked: torch.Tensor
    places: torch.Tensor


def make_pairs(order: Sequence[int], device: torch.device) -> Pairs:
    """List the pairs (order[i], order[j < i]) row by row."""
    num_vectors = len(order)
    rows, columns = torch.tril_indices(num_vectors, num_vectors, offset=-1)
    order_N = torch.tensor(order)
    first, second = order_N[rows], order_N[columns]
    places_NN = torch.full((num_vectors, num_vectors), len(rows))
    places_NN[first, second] = places_NN[second, first] = torch.arange(len(rows))
    return Pairs((first * num_vectors + second).to(device), places_NN.flatten().to(device))


class DenseAndDots(torch.autograd.Function):
    """The dense vector beside the dot products of all pairs, with as few passes over memory as there can be.

    On a CPU the products are taken in fp32 even for a bf16 dense part: picking pairs costs a quarter of what it does
    in bf16 (0.15 against 0.58 ms for B 1024 and 351 pairs; Xeon with AMX, 2026-11-20), and AMX does not help so small
    products.
    """

    @staticmethod
    def forward(ctx: Any, dense_BD: torch.Tensor, pooled_BFD: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Return [B, D + P] in the dtype of `dense_BD`."""
        dtype = torch.float32 if dense_BD.device.type == "cpu" else dense_BD.dtype
        batch_size, dim = dense_BD.shape
        vectors_BND = torch.empty(batch_size, pooled_BFD.shape[1] + 1, dim, dtype=dtype, device=dense_BD.device)
        vectors_BND[:, 0] = dense_BD
        vectors_BND[:, 1:] = pooled_BFD
        with torch.autocast(dense_BD.device.type, enabled=False):
            dots_BNN = torch.bmm(vectors_BND, vectors_BND.transpose(1, 2))
        outputs = dense_BD.new_empty(batch_size, dim + len(pairs.picked))
        outputs[:, :dim] = dense_BD
        outputs[:, dim:] = dots_BNN.flatten(1).index_select(1, pairs.picked)
        ctx.save_for_backward(vectors_BND)
        ctx.pairs, ctx.pooled_dtype = pairs, pooled_BFD.dtype
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """With G the symmetric matrix of the pairs' gradients, whose diagonal is zero: dX = G X."""
        (vectors_BND,) = ctx.saved_tensors
        batch_size, num_vectors, dim = vectors_BND.shape
        num_pairs = len(ctx.pairs.picked)
        dots_grad = vectors_BND.new_empty(batch_size, num_pairs + 1)
        dots_grad[:, :num_pairs] = grad_outputs[0][:, dim:]
        dots_grad[:, num_pairs] = 0
        symmetric_BNN = dots_grad.index_select(1, ctx.pairs.places).view(-1, num_vectors, num_vectors)
        grad_BND = torch.bmm(symmetric_BNN, vectors_BND)
        dense_grad = grad_outputs[0][:, :dim] + grad_BND[:, 0].to(grad_outputs[0].dtype)
        return dense_grad, grad_BND[:, 1:].to(ctx.pooled_dtype), None


def dense_and_dots(dense_BD: torch.Tensor, pooled_BFD: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
    """Return [B, D + P] in the dtype of `dense_BD`, as `DenseAndDots` does: for serving, in a form that exports."""
    dtype = torch.float32 if dense_BD.device.type == "cpu" else dense_BD.dtype
    vectors_BND = torch.cat([dense_BD[:, None].to(dtype), pooled_BFD.to(dtype)], dim=1)
    dots_BNN = torch.bmm(vectors_BND, vectors_BND.transpose(1, 2))
    return torch.cat([dense_BD, dots_BNN.flatten(1).index_select(1, picked).to(dense_BD.dtype)], dim=1)


class LowRankCrossNet(nn.Module):
    """Layers x <- x0 * (W V x + b) + x, with W [N, r] and V [r, N].

    TorchRec has the same under the same name; parameters bear its names, so that checkpoints fit either, and take
    their initial values from the generator in its order.
    """

    def __init__(self, in_features: int, num_layers: int, low_rank: int) -> None:
        super().__init__()
        self.W_kernels = nn.ParameterList([_xavier(in_features, low_rank) for _ in range(num_layers)])
        self.V_kernels = nn.ParameterList([_xavier(low_rank, in_features) for _ in range(num_layers)])
        self.bias = nn.ParameterList([nn.Parameter(torch.zeros(in_features)) for _ in range(num_layers)])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return [B, N]; `inputs` is [B, N]."""
        crossed = inputs
        for wide, narrow, bias in zip(self.W_kernels, self.V_kernels, self.bias, strict=True):
            low_rank = nn.functional.linear(crossed, narrow)
            crossed = inputs * (nn.functional.linear(low_rank, wide) + bias) + crossed
        return crossed


def _xavier(num_rows: int, num_columns: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_normal_(torch.empty(num_rows, num_columns)))
