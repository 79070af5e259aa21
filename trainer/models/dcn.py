"""DLRM-DCNv2: DLRM with low-rank cross layers as its interaction (Wang et al., arXiv 2008.13535; MLPerf's DLRM)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from papilio.trainer.models.interaction import LowRankCrossNet
from papilio.trainer.models.mlp import make_mlp


class DLRMDCNv2(nn.Module):
    """Dense vector and pooled embeddings side by side, through the cross layers, and an MLP to one logit."""

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        feature_names: Sequence[str],
        dense_in_features: int,
        dense_arch_layer_sizes: Sequence[int],
        over_arch_layer_sizes: Sequence[int],
        embedding_dim: int,
        num_layers: int,
        low_rank_dim: int,
    ) -> None:
        super().__init__()
        width = (len(feature_names) + 1) * embedding_dim
        self.embedding_bag_collection = embedding_bag_collection
        self.pooled_features = PooledFeatures(feature_names, embedding_dim)
        self.dense_arch = make_mlp(dense_in_features, dense_arch_layer_sizes, embedding_dim, last_relu=True)
        self.crossnet = LowRankCrossNet(width, num_layers, low_rank_dim)
        self.over_arch = make_mlp(width, over_arch_layer_sizes, 1, last_relu=False)

    def forward(self, dense_features: torch.Tensor, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        """Return logits [B]; `dense_features` is [B, I] float32."""
        pooled = self.embedding_bag_collection(sparse_features)
        dense_BD = self.dense_arch(dense_features)
        pooled_BFD = self.pooled_features(pooled).to(dense_BD.dtype)
        crossed = self.crossnet(torch.cat([dense_BD, pooled_BFD.flatten(1)], dim=1))
        return self.over_arch(crossed).squeeze(1)  # type: ignore[no-any-return]


class PooledFeatures(nn.Module):
    """Waits for the all-to-all of the pooled embeddings and puts their columns into the order of `feature_names`.

    A `KeyedTensor`'s columns follow the plan, so a model that read them as they come would change with it.
    """

    def __init__(self, feature_names: Sequence[str], embedding_dim: int) -> None:
        super().__init__()
        self._feature_names = list(feature_names)
        self._embedding_dim = embedding_dim
        self._orders: dict[tuple[str, ...], torch.Tensor | None] = {}

    def forward(self, pooled: KeyedTensor) -> torch.Tensor:
        """Return [B, F, D], in the dtype of `pooled`."""
        values_BFD = pooled.values().view(-1, len(self._feature_names), self._embedding_dim)
        order = self._order_of(tuple(pooled.keys()), values_BFD.device)
        return values_BFD if order is None else values_BFD.index_select(1, order)  # type: ignore[no-any-return]

    def _order_of(self, keys: tuple[str, ...], device: torch.device) -> torch.Tensor | None:
        if keys not in self._orders:
            order = [keys.index(name) for name in self._feature_names]
            is_identity = order == list(range(len(order)))
            self._orders[keys] = None if is_identity else torch.tensor(order, device=device)
        return self._orders[keys]
