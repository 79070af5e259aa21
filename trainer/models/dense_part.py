"""Models without their tables: dense inputs and pooled embeddings in, logits out. For serving; needs no torchrec.

Layers, parameters' names and arithmetic are those of `DLRM` and `DLRMDCNv2`, which training shards.
"""

from __future__ import annotations

import torch
from torch import nn

from papilio.trainer.config import ModelConfig
from papilio.trainer.models.interaction import LowRankCrossNet, dense_and_dots, make_pairs
from papilio.trainer.models.mlp import make_mlp


class DotDensePart(nn.Module):
    """DLRM: bottom MLP, pairwise dot products, top MLP."""

    def __init__(self, config: ModelConfig, num_dense: int, num_features: int) -> None:
        super().__init__()
        dim, num_vectors = config.embedding_dim, num_features + 1
        over_in_features = dim + num_vectors * (num_vectors - 1) // 2
        self.dense_arch = make_mlp(num_dense, config.dense_arch_layer_sizes, dim, last_relu=True)
        self.over_arch = make_mlp(over_in_features, config.over_arch_layer_sizes, 1, last_relu=False)
        picked = make_pairs(range(num_vectors), torch.device("cpu")).picked
        self.register_buffer("picked", picked, persistent=False)
        self.picked: torch.Tensor

    def forward(self, dense_BI: torch.Tensor, pooled_BFD: torch.Tensor) -> torch.Tensor:
        """Return logits [B]."""
        dense_BD = self.dense_arch(dense_BI)
        return self.over_arch(dense_and_dots(dense_BD, pooled_BFD, self.picked)).squeeze(1)  # type: ignore[no-any-return]


class CrossDensePart(nn.Module):
    """DLRM-DCNv2: bottom MLP, cross layers, top MLP."""

    def __init__(self, config: ModelConfig, num_dense: int, num_features: int) -> None:
        super().__init__()
        dim, width = config.embedding_dim, (num_features + 1) * config.embedding_dim
        self.dense_arch = make_mlp(num_dense, config.dense_arch_layer_sizes, dim, last_relu=True)
        self.crossnet = LowRankCrossNet(width, config.dcn_num_layers, config.dcn_low_rank_dim)
        self.over_arch = make_mlp(width, config.over_arch_layer_sizes, 1, last_relu=False)

    def forward(self, dense_BI: torch.Tensor, pooled_BFD: torch.Tensor) -> torch.Tensor:
        """Return logits [B]."""
        dense_BD = self.dense_arch(dense_BI)
        crossed = self.crossnet(torch.cat([dense_BD, pooled_BFD.flatten(1).to(dense_BD.dtype)], dim=1))
        return self.over_arch(crossed).squeeze(1)  # type: ignore[no-any-return]


DensePart = DotDensePart | CrossDensePart


def build_dense_part(config: ModelConfig, num_dense: int, num_features: int) -> DensePart:
    """Build the dense part of the architecture that the config names; weights are random."""
    if config.architecture == "dlrm":
        return DotDensePart(config, num_dense, num_features)
    return CrossDensePart(config, num_dense, num_features)
