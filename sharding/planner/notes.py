"""What a person should know of a plan before trusting it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from papilio.sharding.planner.job import SPARSE_STATE_BYTES, Cluster, Job
from papilio.sharding.planner.options import Option

MAX_NAMES = 3
# A first row shard with so many times its even share is worth a word.
NOTABLE_IMBALANCE = 1.5


def make_notes(job: Job, cluster: Cluster, options: Iterable[Option]) -> tuple[str, ...]:
    """Return sentences on skewed rows, on optimizer state that is kept in pieces, and on hosts' memory."""
    options = list(options)
    notes = []
    skewed = [o for o in options if o.hottest_share * o.num_row_shards >= NOTABLE_IMBALANCE]
    if skewed:
        worst = max(skewed, key=lambda option: option.hottest_share * option.num_row_shards)
        notes.append(
            f"{_names(skewed)}: cut by rows, and the most frequent ids lie in the first rows, so the first shard of "
            f"{worst.table.name} gets {worst.hottest_share:.0%} of its ids; hashing the ids would spread them"
        )
    names = [option.table.name for option in options if option.num_column_shards > 1]
    notes += row_state_note(names, job.sparse_optimizer)
    replicas = [option for option in options if option.sharding_type == "data_parallel"]
    if replicas:
        notes.append(
            f"{_names(replicas)}: data_parallel, so every step passes over the whole table, not only over the rows "
            "looked up"
        )
    if cluster.num_groups > 1:
        notes.append(
            f"{cluster.num_groups} groups of {cluster.group_size} rank(s), each with all tables: the ranks shown are "
            "those of one group"
        )
    return tuple(notes)


def row_state_note(cut_tables: Sequence[str], sparse_optimizer: str) -> tuple[str, ...]:
    """Say what it means that tables with a number of state a row are cut by columns; nothing where there are none."""
    if not cut_tables or not SPARSE_STATE_BYTES[sparse_optimizer][1]:
        return ()
    return (
        f"{_first(cut_tables)}: cut by columns, as the recipe or plan asks, and {sparse_optimizer} keeps its number "
        "of a row for each column block apart, so they are not trained as whole tables are: their weights move away",
    )


def _names(options: Sequence[Option]) -> str:
    return _first([option.table.name for option in options])


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
