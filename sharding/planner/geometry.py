"""Where TorchRec cuts a table of each sharding type: the rectangles that training really uses.

TorchRec sends an id to the rank `id // ceil(num_embeddings / num_row_shards)`, whatever a plan says of the shards
(torchrec/distributed/embedding_sharding.py, bucketize_kjt_before_all2all), and cuts columns into equal blocks. A plan
with any other rectangles would train another model, so plans are made by these functions and held against them.
"""

from __future__ import annotations

from collections.abc import Sequence

from papilio.sharding.plan_file import PlannedTable, ShardPlace
from papilio.sharding.planner.errors import PlanError

COLUMN_MULTIPLE = 4  # FBGEMM's kernels read whole vectors of four columns
COLUMN_TYPES = ("column_wise", "table_column_wise", "grid_shard")
FUSED_KERNELS = {"cpu": ("fused",), "cuda": ("fused", "fused_uvm", "fused_uvm_caching")}


def count_row_shards(sharding_type: str, group_size: int, ranks_per_host: int) -> int:
    """Return how many row shards each column block of a table has."""
    return {"row_wise": group_size, "table_row_wise": ranks_per_host, "grid_shard": ranks_per_host}.get(
        sharding_type, 1
    )


def cut_table(
    num_embeddings: int, embedding_dim: int, num_row_shards: int, num_column_shards: int, ranks: Sequence[int]
) -> tuple[ShardPlace, ...]:
    """Return the rectangle of each shard, column block by column block, as TorchRec orders them.

    Rows are cut by ceiling division, so that the last shards may have fewer rows, or none.
    """
    rows, columns = -(-num_embeddings // num_row_shards), embedding_dim // num_column_shards
    places = []
    for index, rank in enumerate(ranks):
        block, row_shard = divmod(index, num_row_shards)
        row = min(row_shard * rows, num_embeddings)
        places.append(
            ShardPlace(
                row=row,
                column=block * columns,
                num_rows=min(rows, num_embeddings - row),
                num_columns=columns,
                rank=int(rank),
            )
        )
    return tuple(places)


def check_geometry(table: PlannedTable, *, group_size: int, ranks_per_host: int, device: str, source: str) -> None:
    """Check that a planned table has the kernel, the ranks and the rectangles that its sharding type trains with.

    Args:
        table: of a plan file.
        group_size: ranks that one copy of the tables is spread over.
        ranks_per_host: of them, on one host.
        device: "cpu" or "cuda".
        source: names the plan in errors.

    Raises:
        PlanError: naming the table, what the plan says and what the type needs.
    """
    what = f"{source}: table {table.name} is {table.sharding_type}"
    _check_kernel(table, device, what)
    if table.sharding_type == "data_parallel":
        if table.shards or table.ranks != tuple(range(group_size)):
            raise PlanError(
                f"{what}: every rank holds the whole table, so it has ranks 0 to {group_size - 1} and no "
                "shards; make the plan again"
            )
        return
    if tuple(shard.rank for shard in table.shards) != table.ranks:
        raise PlanError(f"{source}: the ranks of table {table.name} are not those of its shards; make the plan again")
    if table.sharding_type == "grid_shard" and table.num_embeddings == 1:
        raise PlanError(f"{what}, but has a single row; make the plan again with `papilio plan`")
    num_row_shards = count_row_shards(table.sharding_type, group_size, ranks_per_host)
    num_blocks = _count_blocks(table, num_row_shards, what)
    _check_ranks(table, num_row_shards, num_blocks, group_size, ranks_per_host, what)
    right = cut_table(table.num_embeddings, table.embedding_dim, num_row_shards, num_blocks, table.ranks)
    for number, (found, expected) in enumerate(zip(table.shards, right, strict=True)):
        if found != expected:
            raise PlanError(
                f"{what}: shard {number} holds {_describe(found)}, but training gives rank {expected.rank} "
                f"{_describe(expected)}; make the plan again with `papilio plan`"
            )


def _check_kernel(table: PlannedTable, device: str, what: str) -> None:
    allowed = ("dense",) if table.sharding_type == "data_parallel" else FUSED_KERNELS[device]
    if table.compute_kernel not in allowed:
        raise PlanError(
            f"{what} with the kernel {table.compute_kernel}; on {device} it takes {' or '.join(allowed)}: make the "
            "plan again with `papilio plan`"
        )
    has_cache = table.compute_kernel == "fused_uvm_caching"
    factor = table.cache_load_factor
    if has_cache != (factor is not None) or (factor is not None and not 0 < factor < 1):
        needed = "a number between 0 and 1" if has_cache else "none"
        raise PlanError(
            f"{what} with the kernel {table.compute_kernel} and cache_load_factor {factor}; it needs {needed}: make "
            "the plan again with `papilio plan`"
        )


def _count_blocks(table: PlannedTable, num_row_shards: int, what: str) -> int:
    num_blocks, rest = divmod(len(table.shards), num_row_shards)
    if rest or not num_blocks or (num_blocks > 1 and table.sharding_type not in COLUMN_TYPES):
        needed = f"a multiple of {num_row_shards}" if table.sharding_type in COLUMN_TYPES else f"{num_row_shards}"
        raise PlanError(f"{what} in {len(table.shards)} shard(s), but needs {needed}; make the plan again")
    width, rest = divmod(table.embedding_dim, num_blocks)
    if rest or (num_blocks > 1 and width % COLUMN_MULTIPLE):
        raise PlanError(
            f"{what} in {num_blocks} column blocks, but its {table.embedding_dim} columns cannot be cut into "
            f"{num_blocks} equal blocks of a multiple of {COLUMN_MULTIPLE}; make the plan again"
        )
    return num_blocks


def _check_ranks(
    table: PlannedTable, num_row_shards: int, num_blocks: int, group_size: int, ranks_per_host: int, what: str
) -> None:
    wrong = [rank for rank in table.ranks if rank >= group_size]
    if wrong:
        raise PlanError(
            f"{what} on rank {wrong[0]}, but tables are spread over ranks 0 to {group_size - 1}; make the plan again"
        )
    if len(set(table.ranks)) != len(table.ranks):
        twice = next(rank for rank in table.ranks if table.ranks.count(rank) > 1)
        raise PlanError(f"{what} and gives rank {twice} more than one shard; make the plan again")
    blocks = [table.ranks[block * num_row_shards :][:num_row_shards] for block in range(num_blocks)]
    if table.sharding_type == "row_wise" and blocks != [tuple(range(group_size))]:
        raise PlanError(f"{what}: its shards lie on ranks 0 to {group_size - 1} in order; make the plan again")
    if table.sharding_type in ("table_row_wise", "grid_shard"):
        for ranks in blocks:
            first = ranks[0] // ranks_per_host * ranks_per_host
            if ranks != tuple(range(first, first + ranks_per_host)):
                raise PlanError(
                    f"{what}: the rows of a column block lie on all ranks of one host in order, not on "
                    f"{', '.join(map(str, ranks))}; make the plan again"
                )
    if table.sharding_type == "table_column_wise" and len({rank // ranks_per_host for rank in table.ranks}) > 1:
        raise PlanError(f"{what}: its shards lie on one host, not on several; make the plan again")


def _describe(place: ShardPlace) -> str:
    rows = f"rows {place.row} to {place.row + place.num_rows - 1}" if place.num_rows else "no rows"
    return f"{rows}, columns {place.column} to {place.column + place.num_columns - 1} on rank {place.rank}"
