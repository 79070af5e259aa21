"""DLRM-DCNv2: DLRM with low-rank cross layers as its interaction (Wang et al., arXiv 2008.13535; MLPerf's DLRM)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from papilio.trainer.models.cross_net import LowRankCrossNet
from papilio.trainer.models.mlp import make_mlp
from papilio.trainer.models.pooled import PooledFeatures


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
