"""DLRM: bottom MLP, embedding tables, pairwise dot interaction, top MLP (Naumov et al., arXiv 1906.00091).

B batch, F categorical features, D embedding dim, I dense inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from trainer.models.mlp import make_mlp


class DLRM(nn.Module):
    """Dense inputs and pooled embeddings, their pairwise dot products, and an MLP to one logit.

    The tables come first: their all-to-all is on its way while the bottom MLP works, and the gradients' all-to-all
    while its backward pass does.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        feature_names: Sequence[str],
        dense_in_features: int,
        dense_arch_layer_sizes: Sequence[int],
        over_arch_layer_sizes: Sequence[int],
        embedding_dim: int,
    ) -> None:
        super().__init__()
        num_vectors = len(feature_names) + 1
        num_pairs = num_vectors * (num_vectors - 1) // 2
        self.embedding_bag_collection = embedding_bag_collection
        self.dense_arch = make_mlp(dense_in_features, dense_arch_layer_sizes, embedding_dim, last_relu=True)
        self.interaction = DotInteraction(feature_names, embedding_dim)
        self.over_arch = make_mlp(embedding_dim + num_pairs, over_arch_layer_sizes, 1, last_relu=False)

    def forward(self, dense_features: torch.Tensor, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        """Return logits [B]; `dense_features` is [B, I] float32."""
        pooled = self.embedding_bag_collection(sparse_features)
        dense_BD = self.dense_arch(dense_features)
        return self.over_arch(self.interaction(dense_BD, pooled)).squeeze(1)  # type: ignore[no-any-return]


class DotInteraction(nn.Module):
    """The dense vector, then the dot products of all pairs of the F + 1 vectors: the dense one, then the features'.

    Which pair stands where depends on the features' names only, not on the order in which the plan left their columns.
    """

    def __init__(self, feature_names: Sequence[str], embedding_dim: int) -> None:
        super().__init__()
        self._feature_names = list(feature_names)
        self._embedding_dim = embedding_dim
        self._pairs: dict[tuple[str, ...], Pairs] = {}

    @property
    def num_vectors(self) -> int:
        """F + 1."""
        return len(self._feature_names) + 1

    @property
    def embedding_dim(self) -> int:
        """Length of the vectors."""
        return self._embedding_dim

    def forward(self, dense_BD: torch.Tensor, pooled: KeyedTensor) -> torch.Tensor:
        """Return [B, D + (F + 1) F / 2] in the dtype of `dense_BD`; pairs (i, j < i) row by row."""
        pooled_BFD = pooled.values().view(-1, len(self._feature_names), self._embedding_dim)
        pairs = self._pairs_of(tuple(pooled.keys()), dense_BD.device)
        interacted: torch.Tensor = DenseAndDots.apply(dense_BD, pooled_BFD, pairs)  # type: ignore[no-untyped-call]
        return interacted

    def _pairs_of(self, keys: tuple[str, ...], device: torch.device) -> Pairs:
        if keys not in self._pairs:
            self._pairs[keys] = make_pairs([0, *(1 + keys.index(name) for name in self._feature_names)], device)
        return self._pairs[keys]


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
