"""Fully connected layers, as in the DLRM paper (Naumov et al., arXiv 1906.00091)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import nn


def make_mlp(in_features: int, hidden_sizes: Sequence[int], out_features: int, *, last_relu: bool) -> nn.Sequential:
    """Build Linear layers with ReLU between them (and after the last one when `last_relu`).

    Weights are normal with variance 2 / (inputs + outputs), biases normal with variance 1 / outputs: the initial
    values of the DLRM authors' code.
    """
    sizes = [in_features, *hidden_sizes, out_features]
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.normal_(linear.weight, std=math.sqrt(2 / (fan_in + fan_out)))
        nn.init.normal_(linear.bias, std=math.sqrt(1 / fan_out))
        layers.append(linear)
        if last_relu or index < len(sizes) - 2:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
