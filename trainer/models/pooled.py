"""The pooled embeddings of a batch in the features' own order, whatever order the sharding left them in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedTensor


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
