"""Dense parts for serving whose weights take half the bytes: rounded to bf16, arranged for many samples or for one.

Both have the same weights; in the second activations stay in fp32. What rounding costs is measured, never assumed.
"""

from __future__ import annotations

import torch
from torch import nn

from papilio.trainer.models.dense_part import DensePart
from papilio.trainer.models.interaction import LowRankCrossNet

# Columns of an AMX tile of bf16: for a width that is no multiple the compiler takes slower code.
TILE_COLUMNS = 32


def for_many_samples(part: DensePart) -> nn.Module:
    """Turn a dense part's matrix products to bf16; the last layer, of one output, stays in fp32."""
    over_arch = _TopInBfloat16(part.over_arch)
    part.bfloat16()
    part.dense_arch = nn.Sequential(_ToBfloat16(), *part.dense_arch)
    part.over_arch = over_arch.bfloat16()  # type: ignore[assignment]
    over_arch.last.float()
    return part


def for_one_sample(part: DensePart) -> nn.Module:
    """Write a dense part's matrix products as sums, which the compiler turns into one pass over bf16 weights.

    At one sample time goes into reading weights, and oneDNN's bf16 product takes longer than that.
    """
    for parent in list(part.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, _SumLinear(child.weight, child.bias))
            elif isinstance(child, LowRankCrossNet):
                setattr(parent, name, _SumCrossNet(child))
    return part


class _ToBfloat16(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.bfloat16()


class _TopInBfloat16(nn.Module):
    """A top MLP whose input is padded to whole tiles."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        first = layers[0]
        assert isinstance(first, nn.Linear)
        self._padding = -first.in_features % TILE_COLUMNS
        first.weight = nn.Parameter(nn.functional.pad(first.weight, (0, self._padding)), requires_grad=False)
        self.hidden = nn.Sequential(*list(layers)[:-1])
        self.last = layers[-1]

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(nn.functional.pad(values.bfloat16(), (0, self._padding)))
        return self.last(hidden.float())  # type: ignore[no-any-return]


class _SumLinear(nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("weight", weight.detach().bfloat16())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        sums = (values[:, None, :] * self.weight.float()).sum(-1)
        return sums if self.bias is None else sums + self.bias


class _SumCrossNet(nn.Module):
    """`LowRankCrossNet` by sums."""

    def __init__(self, net: LowRankCrossNet) -> None:
        super().__init__()
        self.wide = nn.ModuleList(_SumLinear(wide, bias) for wide, bias in zip(net.W_kernels, net.bias, strict=True))
        self.narrow = nn.ModuleList(_SumLinear(narrow, None) for narrow in net.V_kernels)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        crossed = inputs
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            crossed = inputs * wide(narrow(crossed)) + crossed
        return crossed
