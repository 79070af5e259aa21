"""What all formats have in common: how a request looks, and what is checked before a graph sees it.

B batch, F categorical features, I dense inputs, V ids in the batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from papilio.trainer.inference.package.format import PackageManifest

# A compiled graph on checked tensors: (dense [B, I], ids [V], lengths [F * B]) -> (probabilities [B], unknown ids []).
RunGraph = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class TensorError(ValueError):
    """Tensors that are no request for this package; nothing was computed."""


class Predictor:
    """A package in one of its formats; safe to call from several threads.

    Attributes:
        format_name: the format.
        num_unknown_ids: ids so far that their table does not have; they were read as row 0, the unknown row.
    """

    def __init__(self, format_name: str, manifest: PackageManifest, run_graph: RunGraph) -> None:
        self.format_name = format_name
        self.num_unknown_ids = 0
        self._features = manifest.features
        self._num_dense = len(manifest.dense_features)
        self._run_graph = run_graph
        self._lock = threading.Lock()

    def predict(self, dense: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return probabilities [B] fp32; the tensors given are only read.

        Args:
            dense: [B, I] fp32.
            ids: [V] int32 or int64, feature by feature, in each sample by sample.
            lengths: [F * B] int32 or int64, the numbers of ids of the bags, in the same order; 0 is an empty bag.

        Raises:
            TensorError: shapes or types do not fit the package or each other.
        """
        dense, ids, lengths = self._checked(dense, ids, lengths)
        if dense.shape[0] == 0:
            return torch.empty(0)
        with torch.inference_mode():
            probabilities, num_unknown = self._run_graph(dense, ids, lengths)
        if count := int(num_unknown):
            with self._lock:
                self.num_unknown_ids += count
        return probabilities

    def _checked(
        self, dense: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if dense.dtype != torch.float32 or dense.dim() != 2 or dense.shape[1] != self._num_dense:
            raise TensorError(f"dense must be float32 of shape [samples, {self._num_dense}]; it is {_describe(dense)}")
        for name, tensor in (("ids", ids), ("lengths", lengths)):
            if tensor.dtype not in {torch.int32, torch.int64} or tensor.dim() != 1:
                raise TensorError(f"{name} must be int32 or int64 with one dimension; it is {_describe(tensor)}")
        num_bags = len(self._features) * dense.shape[0]
        if lengths.shape[0] != num_bags:
            raise TensorError(
                f"lengths must have {num_bags} entries, one for each of {len(self._features)} features of each of "
                f"{dense.shape[0]} samples; it has {lengths.shape[0]}"
            )
        # Wrong lengths would make a lookup read other memory: this check is what keeps it safe.
        if num_bags and (int(lengths.min()) < 0 or int(lengths.sum()) != ids.shape[0]):
            raise TensorError(
                f"lengths must be 0 or more and add up to the number of ids, {ids.shape[0]}; they add up to "
                f"{int(lengths.sum())} and the smallest is {int(lengths.min())}"
            )
        return dense.contiguous(), _as_int32(ids), lengths.to(torch.int32).contiguous()


def _as_int32(ids: torch.Tensor) -> torch.Tensor:
    """Narrow ids; those beyond int32 stay unknown ones instead of turning into others."""
    if ids.dtype == torch.int64:
        ids = ids.clamp(-1, torch.iinfo(torch.int32).max).to(torch.int32)
    return ids.contiguous()


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
