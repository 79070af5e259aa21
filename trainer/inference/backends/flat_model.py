"""A packaged model for lookups on a CPU: plain tensors in, probabilities out. Needs no torchrec.

B batch, F features, D embedding dim, I dense inputs, V ids of all bags together.
"""

from __future__ import annotations

from collections.abc import Sequence

import fbgemm_gpu  # noqa: F401  # registers torch.ops.fbgemm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from papilio.trainer.config import ModelConfig
from papilio.trainer.inference.package.format import (
    CONFIG,
    DENSE,
    PRECISIONS,
    TABLES,
    Package,
    PackageError,
    TableEntry,
)
from papilio.trainer.models.dense_part import DensePart, build_dense_part

# FBGEMM's own numbers: fbgemm_gpu.split_embedding_configs.SparseType, EmbeddingLocation and PoolingMode.
WEIGHT_TYPES = {"fp32": 0, "fp16": 1, "int8": 2, "int4": 3, "int2": 4}
FP32_OUTPUT = 0
ON_HOST, ON_DEVICE = 3, 0
SUM_POOLING = 0
ROW_ALIGNMENT = 1
# FBGEMM's kernels for GPUs read rows that begin at multiples of it.
DEVICE_ROW_ALIGNMENT = 16
# fbgemm_gpu.split_table_batched_embeddings_ops_common.BoundsCheckMode.IGNORE: ids out of range become 0.
IGNORE = 2


class TableLookup(nn.Module):
    """All tables of a package: bags of ids in, pooled rows out.

    Attributes:
        weights: [bytes] uint8, `tables.bin` as it is; read-only where it is mapped.
        num_rows: [F] int64, rows of each feature's table.
    """

    def __init__(
        self,
        tables: Sequence[TableEntry],
        weights: torch.Tensor,
        *,
        offsets: Sequence[int] | None = None,
        row_alignment: int = ROW_ALIGNMENT,
    ) -> None:
        """Look up tables in `weights`, where they lie as in `tables.bin` unless `offsets` and `row_alignment` say."""
        super().__init__()
        self._row_alignment = row_alignment
        place = ON_HOST if weights.device.type == "cpu" else ON_DEVICE
        self.num_features, self.dim = len(tables), tables[0].dim
        self._largest_dims = dict.fromkeys(PRECISIONS, 0) | {table.precision: self.dim for table in tables}
        self._has_means = any(table.pooling == "mean" for table in tables)
        self.weights: torch.Tensor
        self.num_rows: torch.Tensor
        self.is_mean: torch.Tensor
        self.register_buffer("weights", weights)
        for name, values, dtype in (
            ("num_rows", [table.rows for table in tables], torch.int64),
            ("offsets", offsets or [table.offset for table in tables], torch.int64),
            ("types", [WEIGHT_TYPES[table.precision] for table in tables], torch.uint8),
            ("places", [place] * len(tables), torch.int32),
            ("columns", [self.dim * number for number in range(len(tables) + 1)], torch.int32),
            ("is_mean", [table.pooling == "mean" for table in tables], torch.bool),
            ("elsewhere", [], torch.uint8),
            ("no_warning", [0], torch.int64),
        ):
            self.register_buffer(name, torch.tensor(values, dtype=dtype, device=weights.device))

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return the pooled rows [B, F, D] fp32; an empty bag gives zeros, an id out of range row 0, the unknown one.

        Args:
            ids: [V] int32, the bags of the first feature, then those of the second, and so on; not changed.
            lengths: [F * B] int32, ids of each bag, in the same order.
        """
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
        pooled = self.call_operator(self._known_ids(ids, lengths, offsets), offsets, FP32_OUTPUT)
        pooled = pooled.view(-1, self.num_features, self.dim)
        if not self._has_means:
            return pooled
        # The operator knows one kind of pooling for all tables.
        divisors_FB = self._by_feature(lengths).clamp_min(1).masked_fill(~self.is_mean[:, None], 1)
        return pooled.div_(divisors_FB.T[:, :, None])

    def call_operator(self, ids: torch.Tensor, offsets: torch.Tensor, output_dtype: int) -> torch.Tensor:
        """Return sums [B, F * D] by FBGEMM's operator alone, which reads whatever memory a wrong id points to.

        Args:
            ids: [V] int32, each a row of its table.
            offsets: [F * B + 1] int32, where the bags begin.
            output_dtype: as FBGEMM counts types.
        """
        sums: torch.Tensor = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            dev_weights=self.weights,
            uvm_weights=self.elsewhere,
            weights_placements=self.places,
            weights_offsets=self.offsets,
            weights_tys=self.types,
            D_offsets=self.columns,
            total_D=self.num_features * self.dim,
            max_int2_D=self._largest_dims["int2"],
            max_int4_D=self._largest_dims["int4"],
            max_int8_D=self._largest_dims["int8"],
            max_float16_D=self._largest_dims["fp16"],
            max_float32_D=self._largest_dims["fp32"],
            indices=ids,
            offsets=offsets,
            pooling_mode=SUM_POOLING,
            indice_weights=None,
            output_dtype=output_dtype,
            lxu_cache_weights=None,
            lxu_cache_locations=None,
            row_alignment=self._row_alignment,
        )
        return sums

    def num_unknown_ids(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return how many ids are out of range, a scalar int64; arguments as of `forward`."""
        known = self._known_ids(ids, lengths, torch.ops.fbgemm.asynchronous_complete_cumsum(lengths))
        return (known != ids).sum()

    def _known_ids(self, ids: torch.Tensor, lengths: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Return a copy of the ids in which those out of range are 0."""
        if not torch.compiler.is_exporting():
            # A third of the time, but it writes into what it is given, and passes -1, which lookups would leave out.
            known = ids.clamp_min(0)
            torch.ops.fbgemm.bounds_check_indices(self.num_rows, known, offsets, IGNORE, self.no_warning, None)
            return known
        rows_V = self.num_rows.int().repeat_interleave(self._by_feature(lengths).sum(1), output_size=ids.shape[0])
        return ids.masked_fill((ids < 0) | (ids >= rows_V), 0)

    def _by_feature(self, lengths: torch.Tensor) -> torch.Tensor:
        # Not -1, which is ambiguous for a batch of no samples.
        return lengths.view(self.num_features, lengths.shape[0] // self.num_features)


class FlatModel(nn.Module):
    """A packaged model."""

    def __init__(self, lookup: TableLookup, dense_part: nn.Module) -> None:
        super().__init__()
        self.lookup = lookup
        self.dense_part = dense_part

    def forward(self, dense: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return probabilities [B] fp32.

        Args:
            dense: [B, I] fp32.
            ids: [V] int32, feature after feature, and of each its bags; see `TableLookup.forward`.
            lengths: [F * B] int32, ids of each bag, feature after feature.
        """
        return torch.sigmoid(self.score(dense, self.pool(ids, lengths)))

    def pool(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return pooled rows [B, F, D] fp32."""
        pooled: torch.Tensor = self.lookup(ids, lengths)
        return pooled

    def score(self, dense: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """Return logits [B] of dense inputs [B, I] and pooled rows [B, F, D]."""
        logits: torch.Tensor = self.dense_part(dense, pooled)
        return logits

    def num_unknown_ids(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return how many ids are out of range and count as unknown, a scalar int64."""
        return self.lookup.num_unknown_ids(ids, lengths)


def build_flat_model(package: Package, *, is_mapped: bool = True) -> FlatModel:
    """Build the model of a package, in evaluation mode and without gradients.

    Args:
        package: what to load.
        is_mapped: leave the tables in the file, which processes on a machine then share; else read them into memory.

    Raises:
        PackageError: a file is damaged, or does not fit the others.
    """
    dense_part = build_dense_of(package)
    weights = map_tables(package)
    model = FlatModel(TableLookup(package.manifest.tables, weights if is_mapped else weights.clone()), dense_part)
    return model.eval().requires_grad_(False)


def map_tables(package: Package) -> torch.Tensor:
    """Map `tables.bin`, [bytes] uint8, once its checksum is found right: processes of a machine share its pages.

    Raises:
        PackageError: it is damaged.
    """
    num_bytes = package.manifest.files[TABLES].num_bytes
    return torch.from_file(package.checked_path(TABLES), shared=False, size=num_bytes, dtype=torch.uint8)


def build_device_model(package: Package, device: torch.device) -> FlatModel:
    """Build the model of a package with its tables in a device's memory, their rows padded as FBGEMM wants them there.

    Not run on a GPU so far; on "cpu" it gives what `build_flat_model` does, from padded rows.

    Raises:
        PackageError: a file is damaged, or does not fit the others.
    """
    mapped = build_flat_model(package).lookup.weights
    padded, offsets, end = [], [], 0
    for table in package.manifest.tables:
        rows = mapped[table.offset : table.offset + table.num_bytes].view(table.rows, table.row_bytes)
        padded.append(nn.functional.pad(rows.to(device), (0, -table.row_bytes % DEVICE_ROW_ALIGNMENT)).view(-1))
        offsets.append(end)
        end += padded[-1].numel()
    lookup = TableLookup(
        package.manifest.tables, torch.cat(padded), offsets=offsets, row_alignment=DEVICE_ROW_ALIGNMENT
    )
    return FlatModel(lookup, build_dense_of(package).to(device)).eval().requires_grad_(False)


def build_dense_of(package: Package) -> DensePart:
    """Build the dense part of a package with its weights, in evaluation mode and without gradients.

    Raises:
        PackageError: a file is damaged, or does not fit the others.
    """
    tables = package.manifest.tables
    if len({table.dim for table in tables}) != 1:
        raise PackageError(f"{package.folder} has tables of several dims; this Papilio knows models with one only")
    config = package.read_section(CONFIG, ModelConfig, "model")
    dense_part = build_dense_part(config, len(package.manifest.dense_features), len(tables))
    try:
        dense_part.load_state_dict(load_file(package.checked_path(DENSE)))
    except (RuntimeError, SafetensorError) as error:
        raise PackageError(f"{package.path(DENSE)} does not fit {CONFIG}: {error}") from None
    return dense_part.eval().requires_grad_(False)
