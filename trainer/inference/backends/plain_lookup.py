"""The tables' lookups by plain operators: gather, scale and sum. For formats that must run without FBGEMM.

B batch, F categorical features, D embedding dim, V ids in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from papilio.trainer.inference.package.format import PRECISION_BITS, SCALE_AND_BIAS_BYTES, TableEntry


class PlainLookup(nn.Module):
    """All tables of a package, inside the graph; same answers as `flat_model.TableLookup`.

    Tables of one precision are one store, whose rows follow each other; every store is asked for every id, the ids of
    other stores at row 0, so that shapes depend on no values.
    """

    def __init__(self, tables: Sequence[TableEntry], table_bytes: torch.Tensor) -> None:
        super().__init__()
        self._num_features, self._dim = len(tables), tables[0].dim
        self._has_means = any(table.pooling == "mean" for table in tables)
        precisions = sorted({table.precision for table in tables})
        self.stores = nn.ModuleList()
        bases = [0] * len(tables)
        for precision in precisions:
            rows, next_row = [], 0
            for place, table in enumerate(tables):
                if table.precision == precision:
                    begin = table.offset
                    rows.append(table_bytes[begin : begin + table.num_bytes].view(table.rows, table.row_bytes))
                    bases[place] = next_row
                    next_row += table.rows
            self.stores.append(_Store(torch.cat(rows), precision, self._dim))
        self.bases: torch.Tensor
        self.num_rows: torch.Tensor
        self.store_numbers: torch.Tensor
        self.is_mean: torch.Tensor
        self.register_buffer("bases", torch.tensor(bases))
        self.register_buffer("num_rows", torch.tensor([table.rows for table in tables]))
        self.register_buffer("store_numbers", torch.tensor([precisions.index(table.precision) for table in tables]))
        self.register_buffer("is_mean", torch.tensor([table.pooling == "mean" for table in tables]))

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pooled [B, F, D] fp32 and the number of unknown ids; takes ids [V] and lengths [F * B], int32."""
        num_samples = lengths.shape[0] // self._num_features
        bag_V = bags_of_ids(lengths, ids.shape[0])
        feature_V = torch.div(bag_V, num_samples, rounding_mode="floor")
        is_known = (ids >= 0) & (ids < self.num_rows.index_select(0, feature_V))
        row_V = torch.where(is_known, ids.long(), 0) + self.bases.index_select(0, feature_V)
        values_VD = self._values(row_V, feature_V)
        # Sample by sample, as the result is wanted: turning it round afterwards does not export for all batch sizes.
        place_V = (bag_V - feature_V * num_samples) * self._num_features + feature_V
        sums = torch.zeros(lengths.shape[0], self._dim).index_add(0, place_V, values_VD)
        pooled_BFD = sums.view(-1, self._num_features, self._dim)
        if self._has_means:
            lengths_BF = lengths.view(self._num_features, -1).t()
            pooled_BFD = pooled_BFD / torch.where(self.is_mean, lengths_BF.clamp(min=1), 1).float()[:, :, None]
        return pooled_BFD, (~is_known).long().sum()

    def _values(self, row_V: torch.Tensor, feature_V: torch.Tensor) -> torch.Tensor:
        if len(self.stores) == 1:
            return self.stores[0](row_V)  # type: ignore[no-any-return]
        number_V = self.store_numbers.index_select(0, feature_V)
        values_VD = torch.zeros(row_V.shape[0], self._dim)
        for number, store in enumerate(self.stores):
            is_here = number_V == number
            values_VD = torch.where(is_here[:, None], store(torch.where(is_here, row_V, 0)), values_VD)
        return values_VD


class _Store(nn.Module):
    """Rows of one precision; scale and bias lie apart from the codes, so a graph needs to know nothing of bytes."""

    def __init__(self, rows: torch.Tensor, precision: str, dim: int) -> None:
        super().__init__()
        self._bits, self._dim = PRECISION_BITS[precision], dim
        self.values: torch.Tensor
        self.codes: torch.Tensor
        self.scale_and_bias: torch.Tensor
        if self._bits >= 16:
            self.register_buffer("values", rows.view(torch.float32 if precision == "fp32" else torch.float16))
        else:
            scale_and_bias = rows[:, :SCALE_AND_BIAS_BYTES].contiguous().view(torch.float16)
            self.register_buffer("scale_and_bias", scale_and_bias)
            self.register_buffer("codes", rows[:, SCALE_AND_BIAS_BYTES:].contiguous())

    def forward(self, row_V: torch.Tensor) -> torch.Tensor:
        """Return values [V, D] fp32."""
        if self._bits >= 16:
            return self.values.index_select(0, row_V).float()
        scale_and_bias = self.scale_and_bias.index_select(0, row_V).float()
        codes = self._unpacked(self.codes.index_select(0, row_V).float())
        return codes * scale_and_bias[:, :1] + scale_and_bias[:, 1:]

    def _unpacked(self, packed: torch.Tensor) -> torch.Tensor:
        """Codes of bytes, the lowest bits first, by arithmetic: not every format has shifts of bytes."""
        base, codes = 1 << self._bits, []
        for _ in range(8 // self._bits):
            higher = torch.floor(packed / base)
            codes.append(packed - higher * base)
            packed = higher
        return codes[0] if len(codes) == 1 else torch.stack(codes, dim=2).flatten(1)


def bags_of_ids(lengths: torch.Tensor, num_ids: int) -> torch.Tensor:
    """Return for each of V ids the number of its bag, [V] int64; `lengths` [F * B] adds up to V.

    A bag's end raises the number of all ids behind it by one: scatter and cumulative sum, which every format knows.
    """
    ends = lengths.long().cumsum(0)[:-1]
    marks = torch.zeros(num_ids + 1, dtype=torch.int64).index_add(0, ends, torch.ones_like(ends))
    return marks.cumsum(0)[:-1]
