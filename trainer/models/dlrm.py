"""DLRM: bottom MLP, embedding tables, pairwise dot interaction, top MLP (Naumov et al., arXiv 1906.00091).

B batch, F categorical features, D embedding dim, I dense inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.models.mlp import make_mlp
from trainer.models.pooled import PooledFeatures


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
        self.pooled_features = PooledFeatures(feature_names, embedding_dim)
        self.dense_arch = make_mlp(dense_in_features, dense_arch_layer_sizes, embedding_dim, last_relu=True)
        self.interaction = DotInteraction()
        self.over_arch = make_mlp(embedding_dim + num_pairs, over_arch_layer_sizes, 1, last_relu=False)

    def forward(self, dense_features: torch.Tensor, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        """Return logits [B]; `dense_features` is [B, I] float32."""
        pooled = self.embedding_bag_collection(sparse_features)
        dense_BD = self.dense_arch(dense_features)
        interacted = self.interaction(dense_BD, self.pooled_features(pooled))
        return self.over_arch(interacted).squeeze(1)  # type: ignore[no-any-return]


class DotInteraction(nn.Module):
    """The dense vector, then the dot products of all pairs of the F + 1 vectors (the dense one being the first)."""

    def forward(self, dense_BD: torch.Tensor, pooled_BFD: torch.Tensor) -> torch.Tensor:
        """Return [B, D + (F + 1) F / 2] in the dtype of `dense_BD`; pairs (i, j < i) row by row."""
        vectors = torch.cat([dense_BD.unsqueeze(1), pooled_BFD.to(dense_BD.dtype)], dim=1)
        dots: torch.Tensor = PairwiseDots.apply(vectors)  # type: ignore[no-untyped-call]
        return torch.cat([dense_BD, dots], dim=1)


class PairwiseDots(torch.autograd.Function):
    """The strict lower triangle of X X^T per sample, as [B, N (N - 1) / 2].

    Slices of rows instead of an index: indexing along the last dimension costs three times as much on a CPU in bf16
    (0.58 ms against 0.19 ms for B 1024, N 27; Xeon with AMX, 2026-11-20), and its backward more still.
    """

    @staticmethod
    def forward(ctx: Any, vectors_BND: torch.Tensor) -> torch.Tensor:
        """Return the dot products of all pairs (i, j < i), row by row."""
        ctx.save_for_backward(vectors_BND)
        dots_BNN = torch.bmm(vectors_BND, vectors_BND.transpose(1, 2))
        return torch.cat([dots_BNN[:, i, :i] for i in range(1, vectors_BND.shape[1])], dim=1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        """With L the gradient as a lower triangle: dX = (L + L^T) X."""
        (vectors_BND,) = ctx.saved_tensors
        grad = grad_outputs[0]
        num_vectors = vectors_BND.shape[1]
        lower_BNN = grad.new_zeros(grad.shape[0], num_vectors, num_vectors)
        for i, row in enumerate(torch.split(grad, list(range(1, num_vectors)), dim=1), start=1):
            lower_BNN[:, i, :i] = row
        return torch.bmm(lower_BNN, vectors_BND).baddbmm_(lower_BNN.transpose(1, 2), vectors_BND)
