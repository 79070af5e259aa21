"""DLRM: bottom MLP, embedding tables, pairwise dot interaction, top MLP (Naumov et al., arXiv 1906.00091).

B batch, F categorical features, D embedding dim, I dense inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from papilio.trainer.models.interaction import DenseAndDots, Pairs, make_pairs
from papilio.trainer.models.mlp import make_mlp


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
