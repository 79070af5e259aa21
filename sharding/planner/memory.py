"""Bytes that a rank needs at the peak of a step, from the sizes of what TorchRec and FBGEMM keep there.

B local batch, W ranks of a group, p ids of a sample and feature, D columns of a shard.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from papilio.sharding.plan_file import MemoryUse
from papilio.sharding.planner.job import BYTES_PER_VALUE, DENSE_STATE_BYTES, Cluster, Job
from papilio.sharding.planner.options import Option

KINDS = tuple(MemoryUse.model_fields)
_PLACE = {kind: index for index, kind in enumerate(KINDS)}
HOST = _PLACE["host_bytes"]
# Ids and bag lengths as the kernels take them: int64.
ID_BYTES = 8
# Batches between the loader's hands and the end of their step: TrainPipelineSparseDist keeps three.
PIPELINE_BATCHES = 3
# Buffers of one all-to-all or reduce-scatter alive at once: what is sent and what arrived, before the first is freed.
EXCHANGE_BUFFERS = 2
# gloo's reduce-scatter and all-gather hold copies of the partial sums, about so many for each rank that takes part
# (measured: DLRMs of 8 and 26 tables on 2 and 4 ranks, Xeon, 2026-11-21).
GLOO_COPIES_PER_ROW_SHARD = 2
# Sorting the ids for the update: ids and positions, in and out.
SORT_BYTES_PER_ID = 32


def shard_bytes(option: Option, job: Job, cluster: Cluster) -> NDArray[np.float64]:
    """Return the bytes of each of KINDS that one shard of the option needs on the rank that holds it."""
    use = np.zeros(len(KINDS))
    weights, state = option.shard_weights_bytes, option.shard_optimizer_bytes(job.sparse_optimizer)
    if option.kernel == "fused_uvm":
        use[HOST] = weights + state
    elif option.kernel == "fused_uvm_caching":
        use[HOST] = weights + state
        use[_PLACE["cache_bytes"]] = (option.cache_load_factor or 0.0) * weights
    else:
        use[_PLACE["weights_bytes"]], use[_PLACE["optimizer_bytes"]] = weights, state
    if option.kernel == "dense":
        # The gradient of the whole table, and its copy in DDP's bucket.
        use[_PLACE["gradients_bytes"]] = 2 * 4 * option.shard_rows * option.shard_columns
    if job.copies_to_save and cluster.hardware.device == "cpu":
        # On a GPU the copy is in the host's memory, which has room for what its GPUs hold.
        use[_PLACE["checkpoint_bytes"]] = weights + state
    num_bags, num_ids = bags_and_ids_of_shard(option, job, cluster)
    copies = EXCHANGE_BUFFERS
    if option.num_row_shards > 1 and cluster.hardware.device == "cpu":
        copies += GLOO_COPIES_PER_ROW_SHARD * option.num_row_shards
    use[_PLACE["activations_bytes"]] = copies * 4 * num_bags * option.shard_columns
    use[_PLACE["input_bytes"]] = PIPELINE_BATCHES * ID_BYTES * (num_ids + num_bags) + SORT_BYTES_PER_ID * num_ids
    return use


def bags_and_ids_of_shard(option: Option, job: Job, cluster: Cluster) -> tuple[float, float]:
    """Return how many bags a shard pools in a step, and of how many ids if it has the most frequent rows."""
    local_batch = job.global_batch_size / cluster.num_ranks
    if option.sharding_type == "data_parallel":
        return local_batch, local_batch * option.table.pooling_factor
    num_bags = local_batch * cluster.group_size
    return num_bags, num_bags * option.table.pooling_factor * option.hottest_share


def rank_bytes(job: Job, cluster: Cluster) -> NDArray[np.float64]:
    """Return the bytes of each of KINDS that every rank needs whatever the plan is."""
    use = np.zeros(len(KINDS))
    local_batch = -(-job.global_batch_size // cluster.num_ranks)
    num_columns = sum(table.embedding_dim for table in job.tables)
    # The pooled embeddings of the rank's own samples: as they arrive, in order for the interaction, and their gradient.
    pooled = 3 * 4 * local_batch * num_columns
    # What the forward pass keeps, and the gradient of the layer at work (a third at most of an MLP's activations).
    dense = 4 / 3 * BYTES_PER_VALUE[job.precision] * local_batch * job.dense.activation_values
    use[_PLACE["activations_bytes"]] = pooled + dense
    ids_per_sample = sum(table.pooling_factor for table in job.tables)
    sample_bytes = 4 * job.num_dense_features + 4 * ids_per_sample + 4 * len(job.tables) + 4
    use[_PLACE["input_bytes"]] = local_batch * sample_bytes * (job.prefetch_batches + PIPELINE_BATCHES)
    # Weights, gradients, DDP's buckets, optimizer state; and the weights in bf16 where autocast keeps them for a step.
    per_parameter = 4 + 4 + 4 + DENSE_STATE_BYTES[job.dense_optimizer] + (2 if job.precision == "bf16" else 0)
    use[_PLACE["dense_bytes"]] = per_parameter * job.dense.num_parameters
    use[_PLACE["framework_bytes"]] = cluster.hardware.framework_memory.si
    return use


def device_bytes(use: NDArray[np.float64]) -> float:
    """Return the bytes on the device of a row of KINDS."""
    return float(use.sum() - use[HOST])


def memory_use(use: NDArray[np.float64]) -> MemoryUse:
    """Return a row of KINDS as a record."""
    return MemoryUse(**{kind: round(use[index]) for kind, index in _PLACE.items()})
