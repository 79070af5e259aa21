"""The options of a table: how it can be cut and stored, before any shard is assigned to a rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from papilio.sharding.planner.geometry import COLUMN_TYPES, count_row_shards
from papilio.sharding.planner.job import BYTES_PER_VALUE, SPARSE_STATE_BYTES, Cluster, Table

UVM_KERNELS = ("fused_uvm", "fused_uvm_caching")


class Span(Enum):
    """Which ranks an option's shards go to."""

    EACH_RANK = "the same on every rank"
    RANK = "each shard on one rank, whichever"
    HOST = "each shard row-wise over the ranks of one host"
    RANKS_OF_HOST = "each shard on one rank, all on one host"


SPANS = {
    "data_parallel": Span.EACH_RANK,
    "table_wise": Span.RANK,
    "row_wise": Span.EACH_RANK,
    "column_wise": Span.RANK,
    "table_row_wise": Span.HOST,
    "table_column_wise": Span.RANKS_OF_HOST,
    "grid_shard": Span.HOST,
}


@dataclass(frozen=True)
class Option:
    """One way to cut and store a table.

    A shard is what one rank holds. Where shards are rows of a column block (row_wise, table_row_wise, grid_shard),
    `num_row_shards` of them make a block; there are `num_column_shards` blocks.
    """

    table: Table
    sharding_type: str
    kernel: str
    num_row_shards: int = 1
    num_column_shards: int = 1
    cache_load_factor: float | None = None

    @property
    def span(self) -> Span:
        """Where its shards may go."""
        return SPANS[self.sharding_type]

    @property
    def hottest_share(self) -> float:
        """Share of the ids that falls on the first of the row shards, which holds the most frequent rows."""
        return float(self.num_row_shards**-self.table.skew_exponent)

    @property
    def shard_rows(self) -> int:
        """Rows of the largest shard; the last one may have fewer, or none (TorchRec cuts by ceiling division)."""
        return -(-self.table.num_embeddings // self.num_row_shards)

    @property
    def shard_columns(self) -> int:
        """Columns of a shard."""
        return self.table.embedding_dim // self.num_column_shards

    @property
    def shard_weights_bytes(self) -> int:
        """Bytes of the largest shard's weights."""
        return BYTES_PER_VALUE[self.table.precision] * self.shard_rows * self.shard_columns

    def shard_optimizer_bytes(self, sparse_optimizer: str) -> int:
        """Bytes of the largest shard's optimizer state; kept per row, it is kept for each column block."""
        per_weight, per_row = SPARSE_STATE_BYTES[sparse_optimizer]
        return self.shard_rows * (per_weight * self.shard_columns + per_row)

    def describe(self) -> str:
        """Name the option in a few words."""
        words = [self.sharding_type]
        if self.num_column_shards > 1:
            words.append(f"in {self.num_column_shards} column blocks of {self.shard_columns}")
        if self.kernel in UVM_KERNELS:
            words.append(self.kernel)
        if self.cache_load_factor is not None:
            words.append(f"at {self.cache_load_factor:g}")
        return " ".join(words)


def enumerate_options(
    table: Table,
    cluster: Cluster,
    *,
    types: tuple[str, ...],
    kernels: tuple[str, ...],
    min_partition: int,
    cache_load_factor: float,
    column_multiple: int = 4,
) -> list[Option]:
    """List every option for a table, in a fixed order.

    Column blocks are equal, at least `min_partition` columns wide and a multiple of 4 (FBGEMM) or of more, and no more
    than the ranks or hosts that can hold them. Types that come to the same as a simpler one are left out if the simpler
    one is allowed: with one host table_row_wise is row_wise and table_column_wise is column_wise, on one rank all are
    table_wise, and a single column block is a whole table.
    """
    num_ranks, per_host = cluster.group_size, cluster.group_ranks_per_node
    num_hosts = num_ranks // per_host
    options: list[Option] = []
    for sharding_type in types:
        if _is_redundant(sharding_type, types, num_hosts, num_ranks):
            continue
        row_shards = count_row_shards(sharding_type, num_ranks, per_host)
        most_blocks = {"column_wise": num_ranks, "table_column_wise": per_host, "grid_shard": num_hosts}
        for num_blocks in _block_counts(table, min_partition, column_multiple, most_blocks.get(sharding_type, 1)):
            for kernel, factor in _kernels(sharding_type, kernels, cluster.hardware.device, cache_load_factor):
                options.append(Option(table, sharding_type, kernel, row_shards, num_blocks, factor))
    cut = [option for option in options if option.sharding_type not in COLUMN_TYPES or option.num_column_shards > 1]
    return cut or options


def _is_redundant(sharding_type: str, types: tuple[str, ...], num_hosts: int, num_ranks: int) -> bool:
    simpler = {"table_row_wise": "row_wise", "table_column_wise": "column_wise"}.get(sharding_type)
    if num_ranks == 1:
        simpler = "table_wise" if sharding_type != "table_wise" else None
    return num_hosts == 1 and simpler in types


def _block_counts(table: Table, min_partition: int, multiple: int, most: int) -> Iterator[int]:
    yield 1
    for count in range(2, most + 1):
        width = table.embedding_dim // count
        if width < max(min_partition, multiple):
            return
        if table.embedding_dim % count == 0 and width % multiple == 0:
            yield count


def _kernels(
    sharding_type: str, kernels: tuple[str, ...], device: str, cache_load_factor: float
) -> Iterator[tuple[str, float | None]]:
    """Yield (kernel, cache load factor) that the type has on the device."""
    if sharding_type == "data_parallel":
        yield "dense", None
        return
    for kernel in kernels:
        if kernel == "dense" or (kernel in UVM_KERNELS and device == "cpu"):
            continue
        yield kernel, cache_load_factor if kernel == "fused_uvm_caching" else None
