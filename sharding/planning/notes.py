"""What a person should know of a plan before trusting it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sharding.planning.job import SPARSE_STATE_BYTES, Cluster, Job
from sharding.planning.options import Option

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
    in_pieces = [option for option in options if option.num_column_shards > 1]
    if in_pieces and SPARSE_STATE_BYTES[job.sparse_optimizer][1]:
        notes.append(
            f"{_names(in_pieces)}: cut by columns as the recipe asks, and {job.sparse_optimizer} keeps its number of a "
            "row for each column block apart, so training is not that of whole tables: the weights move away from it"
        )
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


def _names(options: Sequence[Option]) -> str:
    names = [option.table.name for option in options]
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
