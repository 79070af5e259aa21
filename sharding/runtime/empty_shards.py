"""Ranks that get no row of a table, put right in FBGEMM's CPU kernels.

TorchRec cuts rows by ceiling division: of 5 rows over 4 ranks the last rank gets none. The backward of a table-batched
embedding (TBE) on a CPU tells one table from the next by their bounds in `hash_size_cumsum`, which for a table
without rows are equal (embedding_backward_split_cpu_template.cpp, fbgemm-gpu-cpu 1.8.0): it takes such a table and the
next for one, with the columns of the first, and looks for the end of a last one beyond the end of the bounds, in
whatever memory is there ("more than 2B rows"). A TBE without any rows it takes for one on a GPU. So each table gets
bounds of at least one row, and a TBE at least one row's weights; no id ever leads there.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from papilio.sharding.runtime.table_shards import iterate_tbes


def fix_empty_shards(model: nn.Module) -> None:
    """Let this rank's TBEs on the CPU have tables without rows."""
    for tbe in iterate_tbes(model):
        rows = [spec[0] for spec in tbe.embedding_specs]
        if tbe.current_device.type != "cpu" or all(rows):
            continue
        bounds = list(itertools.accumulate((max(count, 1) for count in rows), initial=0))
        starts = [bounds[table] for table in tbe.feature_table_map]
        tbe.hash_size_cumsum.copy_(torch.tensor([*starts, bounds[-1]]))
        if not any(rows):
            tbe.weights_host = nn.Parameter(torch.zeros(tbe.max_D, dtype=tbe.weights_host.dtype))
