"""Bytes of a table on each rank, and bytes that must travel to make one plan of another."""

from __future__ import annotations

from collections import defaultdict

from papilio.sharding.plan_file import PlannedTable, ShardPlace


def bytes_on_ranks(table: PlannedTable) -> dict[int, int]:
    """Return the bytes of weights and optimizer state that each rank holds, on its device or its host."""
    held: dict[int, float] = defaultdict(float)
    per_value = _bytes_per_value(table)
    for place in held_places(table):
        held[place.rank] += place.num_rows * place.num_columns * per_value
    return {rank: round(num_bytes) for rank, num_bytes in held.items()}


def held_places(table: PlannedTable) -> tuple[ShardPlace, ...]:
    """Return the shards; of data_parallel, which has none, the whole table on each rank."""
    if table.shards:
        return table.shards
    rows, columns = table.num_embeddings, table.embedding_dim
    return tuple(
        ShardPlace(row=0, column=0, num_rows=rows, num_columns=columns, rank=rank) for rank in sorted(set(table.ranks))
    )


def moved_bytes(old: PlannedTable, new: PlannedTable) -> int:
    """Return the bytes that each new holder must be sent, being without them in the old plan.

    The two are one table of one size.
    """
    before: dict[int, list[ShardPlace]] = defaultdict(list)
    for place in held_places(old):
        before[place.rank].append(place)
    values = 0
    for place in held_places(new):
        kept = sum(_overlap(place, other) for other in before[place.rank])
        values += place.num_rows * place.num_columns - kept
    return round(values * _bytes_per_value(new))


def _bytes_per_value(table: PlannedTable) -> float:
    values = sum(place.num_rows * place.num_columns for place in held_places(table))
    return (table.weights_bytes + table.optimizer_bytes) / values if values else 0.0


def _overlap(a: ShardPlace, b: ShardPlace) -> int:
    rows = min(a.row + a.num_rows, b.row + b.num_rows) - max(a.row, b.row)
    columns = min(a.column + a.num_columns, b.column + b.num_columns) - max(a.column, b.column)
    return max(0, rows) * max(0, columns)
