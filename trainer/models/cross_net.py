"""The low-rank cross layers of DCNv2 (Wang et al., arXiv 2008.13535). Needs no torchrec, so serving can use them."""

from __future__ import annotations

import torch
from torch import nn


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
