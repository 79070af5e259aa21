"""Mean pooling beside tables whose rows are cut, put right in TorchRec.

A rank that holds some rows of a table can but sum those that a bag names; the mean needs the length of the whole bag,
so TorchRec divides the pooled output, all features side by side, by a divisor that is 1 for the features with sum
pooling (torchrec issue 2362). It knows both kinds of features from lists, which hold only those of row_wise and
table_row_wise tables (`ShardedEmbeddingBagCollection.__init__`, torchrec 1.6.1 and 1.8.0), and is silently wrong twice:

- grid_shard cuts rows as well, and its kernels sum, but nothing divides: a mean comes out as a sum;
- once some table is divided, all features of all other sharding types are divided by the lengths of their bags too.

The lists are complete when every feature is in one of them. The gradient follows by itself: it passes the division.
"""

from __future__ import annotations

from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import PoolingType

from papilio.sharding.compat.torchrec_internals import divide_by_bag_lengths, tables_of

ROW_CUTTING_TYPES = frozenset(
    {ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value}
)


def fix_mean_pooling(bags: ShardedEmbeddingBagCollection) -> None:
    """Have just those features divided by bag lengths that need it. Call before the first batch."""
    divided: list[str] = []
    kept: list[str] = []
    for table in tables_of(bags):
        cuts_rows = bags.module_sharding_plan[table.name].sharding_type in ROW_CUTTING_TYPES
        is_divided = cuts_rows and table.pooling is PoolingType.MEAN
        (divided if is_divided else kept).extend(table.feature_names)
    if divided:
        divide_by_bag_lengths(bags, divided, kept)
