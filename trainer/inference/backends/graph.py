"""A package's whole model as one graph: dense inputs, ids and lengths in; probabilities and a count of unknown ids out.

B batch, F categorical features, I dense inputs, V ids in the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from papilio.trainer.compat.torch_internals import any_batch_size
from papilio.trainer.inference.backends.flat_model import TableLookup, build_dense_of, map_tables
from papilio.trainer.inference.backends.plain_lookup import PlainLookup
from papilio.trainer.inference.package.format import Package

# Samples and ids a feature of the example that programs are traced with; no size of it may be 0, 1 or equal to another.
_EXAMPLE_SAMPLES = 6
_EXAMPLE_IDS = 3


class GraphOnFile(nn.Module):
    """The model over the bytes of `tables.bin`, which are its first input: compiled code then holds no table."""

    def __init__(self, package: Package, dense_part: nn.Module) -> None:
        super().__init__()
        self.lookup = TableLookup(package.manifest.tables, torch.empty(0, dtype=torch.uint8))
        self.dense_part = dense_part

    def forward(
        self, table_bytes: torch.Tensor, dense: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probabilities [B] fp32 and the number of unknown ids, int64."""
        pooled = functional_call(self.lookup, {"weights": table_bytes}, (ids, lengths))
        return torch.sigmoid(self.dense_part(dense, pooled).float()), self.lookup.num_unknown_ids(ids, lengths)


class PlainGraph(nn.Module):
    """The model with its tables inside, of plain operators only."""

    def __init__(self, package: Package) -> None:
        super().__init__()
        self.lookup = PlainLookup(package.manifest.tables, map_tables(package))
        self.dense_part = build_dense_of(package)

    def forward(
        self, dense: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probabilities [B] fp32 and the number of unknown ids, int64."""
        pooled, num_unknown = self.lookup(ids, lengths)
        return torch.sigmoid(self.dense_part(dense, pooled)), num_unknown


def export_program(graph: nn.Module, package: Package, *leading: torch.Tensor) -> torch.export.ExportedProgram:
    """Trace a graph so that it takes any number of samples, 0 and 1 too, and of ids; `leading` inputs have one size."""
    arguments, shapes = example_inputs(package)
    with torch.no_grad(), any_batch_size():
        return torch.export.export(
            graph, (*leading, *arguments), dynamic_shapes=(*(None for _ in leading), *shapes), strict=False
        )


def example_inputs(package: Package) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, Any], ...]]:
    """Return example tensors (dense, ids, lengths) and which of their sizes are free."""
    num_features = len(package.manifest.tables)
    lengths = torch.full((num_features * _EXAMPLE_SAMPLES,), _EXAMPLE_IDS, dtype=torch.int32)
    ids = torch.zeros(len(lengths) * _EXAMPLE_IDS, dtype=torch.int32)
    dense = torch.zeros(_EXAMPLE_SAMPLES, len(package.manifest.dense_features))
    num_samples, num_ids = torch.export.Dim("num_samples", min=0), torch.export.Dim("num_ids", min=0)
    return (dense, ids, lengths), ({0: num_samples}, {0: num_ids}, {0: num_features * num_samples})
