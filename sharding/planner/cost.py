"""The cost model: seconds that a shard costs its rank, and the seconds of a whole step.

A step is a row of segments between collectives that hold all ranks up, so each segment lasts as long as on its slowest
rank. Every time is a fixed part plus a size over a rate of `sharding.hardware.Rates`; nothing else is known of a
machine. The words used below: W ranks of a group (one copy of the tables), on H hosts of G ranks; B samples of a rank;
p ids of a sample; D columns and R rows of the shard.

Sources: what TorchRec does in each distribution (torchrec/distributed/sharding/*.py), its own estimator
(torchrec/distributed/planner/estimator/estimator.py) for which bytes travel, and Hu et al., arXiv 2201.07821, for the
sum of segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import expm1

import numpy as np

from papilio.sharding.hardware import NEAREST_TOUCHED_BYTES, KernelRates, Rates
from papilio.sharding.plan_file import Phases, StepPrediction
from papilio.sharding.planner.job import BYTES_PER_VALUE, DENSE_STATE_BYTES, SPARSE_STATE_BYTES, Cluster, Job
from papilio.sharding.planner.options import Option

PHASES = tuple(Phases.model_fields)
# Papilio's ids and lengths are int32.
ID_BYTES = 4
LENGTH_BYTES = 4
# Of a backward pass, in forward passes: gradients of inputs and of weights.
BACKWARD_WORK = 2
# Share of the dense part's time that the bottom MLP has, behind which embeddings travel.
BOTTOM_SHARE = 0.25
# Of a sharding type in a step: lengths, ids, pooled embeddings, gradients.
COLLECTIVES = 4
ROW_TYPES = {"row_wise", "table_row_wise", "grid_shard"}


def shard_seconds(option: Option, job: Job, cluster: Cluster) -> np.ndarray:
    """Return the seconds of each of PHASES that one shard of the option costs the rank that holds it."""
    return _model_of(job, cluster).shard_seconds(option)


def option_seconds(option: Option, job: Job, cluster: Cluster) -> float:
    """Return the seconds that the option costs every rank, whether it holds a shard or not."""
    return _model_of(job, cluster).option_seconds(option)


def predict_step(
    rank_phases_WP: np.ndarray,
    options: Sequence[Option],
    job: Job,
    cluster: Cluster,
    *,
    sync_every_steps: int | None = 1,
) -> StepPrediction:
    """Return the seconds of a step.

    Args:
        rank_phases_WP: for each rank of a group the sums of `shard_seconds` over its shards.
        options: what was chosen for each table.
        job: the step.
        cluster: the machines.
        sync_every_steps: steps between averagings of the groups' tables (2D); None: never.
    """
    return _model_of(job, cluster).predict_step(rank_phases_WP, options, sync_every_steps)


class CostModel:
    """The costs of one job on one cluster; what does not depend on the option is estimated once."""

    def __init__(self, job: Job, cluster: Cluster) -> None:
        self.job = job
        self.cluster = cluster
        self._rates: Rates = cluster.rates
        self._num_ranks = cluster.group_size
        self._per_host = cluster.group_ranks_per_node
        self._local_batch = job.global_batch_size / cluster.num_ranks
        self._group_batch = self._local_batch * cluster.group_size
        self._forward_bytes = BYTES_PER_VALUE[job.communication.forward]
        self._backward_bytes = BYTES_PER_VALUE[job.communication.backward]
        self._update_rates = self._rates.update(job.sparse_optimizer)
        self._all_to_all_s_per_byte = self._spread_s_per_byte(self._num_ranks, self._rates.all_to_all_bytes_per_s)

    def shard_seconds(self, option: Option) -> np.ndarray:
        """Return the seconds of each of PHASES that one shard of the option costs the rank that holds it."""
        match option.sharding_type:
            case "data_parallel":
                phases = self._replica(option)
            case "row_wise":
                phases = self._row_block(option, self._num_ranks)
            case "table_row_wise" | "grid_shard":
                phases = self._row_block(option, self._per_host)
            case _:
                phases = self._whole_rows(option)
        return np.array(phases)

    def option_seconds(self, option: Option) -> float:
        """Return what the table costs every rank, whoever holds it: its own samples' ids are put in order of shards.

        The ids of a table in k column blocks are sent k times; row-wise types first find each id's shard.
        """
        rates, table = self._rates, option.table
        pooled_s = self._local_batch * table.embedding_dim * rates.pooled_value_s
        if option.sharding_type == "data_parallel":
            return rates.table_s + pooled_s
        copies = option.num_column_shards
        id_s = rates.id_s + (rates.bucketize_id_s if option.num_row_shards > 1 else 0.0)
        sample_s = copies * (rates.bag_s + table.pooling_factor * id_s)
        return copies * rates.table_s + self._local_batch * sample_s + pooled_s

    def _whole_rows(self, option: Option) -> tuple[float, ...]:
        """table_wise, column_wise, table_column_wise: the owner looks up the W B p ids of all samples.

        W B pooled vectors leave it by all-to-all, and as many gradients come back.
        """
        bags = self._group_batch
        ids = bags * option.table.pooling_factor
        values = bags * option.shard_columns
        wire = self._all_to_all_s_per_byte
        return (
            wire * (ids * ID_BYTES + bags * LENGTH_BYTES),
            self._lookup_s(option, ids, bags),
            wire * values * self._forward_bytes,
            wire * values * self._backward_bytes,
            self._update_s(option, ids, bags),
        )

    def _row_block(self, option: Option, num_shards: int) -> tuple[float, ...]:
        """row_wise (over W ranks), table_row_wise and grid_shard (over the G ranks of a host).

        Each shard sees W B p / shards of the ids and pools all W B bags as far as it has their rows. The partial sums
        meet by reduce-scatter among the shards; from a host the sums go on to the other hosts by all-to-all. Gradients
        come back by all-gather, after the same all-to-all.
        """
        bags = self._group_batch
        ids = bags * option.table.pooling_factor * option.hottest_share
        values = bags * option.shard_columns
        rates = self._rates
        scattered = self._spread_s_per_byte(
            num_shards, rates.reduce_scatter_bytes_per_s or rates.all_to_all_bytes_per_s
        )
        gathered = self._spread_s_per_byte(num_shards, rates.all_gather_bytes_per_s or rates.all_to_all_bytes_per_s)
        across = 0.0
        if num_shards < self._num_ranks:
            between_hosts = (1 - num_shards / self._num_ranks) / num_shards
            across = between_hosts / rates.inter_host_bytes_per_s
        has_second_stage = option.sharding_type != "row_wise"
        sent_on_s = values / num_shards * rates.second_stage_value_s / 2 if has_second_stage else 0.0
        wire = self._all_to_all_s_per_byte
        return (
            wire * (ids * ID_BYTES + bags * LENGTH_BYTES),
            self._lookup_s(option, ids, bags),
            values * (scattered + across) * self._forward_bytes + sent_on_s,
            values * (gathered + across) * self._backward_bytes + sent_on_s,
            self._update_s(option, ids, bags),
        )

    def _replica(self, option: Option) -> tuple[float, ...]:
        """data_parallel: own samples only, a dense gradient of the whole table, and a pass over the whole table."""
        bags = self._local_batch
        table_bytes = 4 * option.table.num_embeddings * option.table.embedding_dim
        state_bytes = DENSE_STATE_BYTES[self.job.dense_optimizer]
        # Gradient cleared, written, read; weights and state read and written.
        passes = 5 + 2 * state_bytes / 4
        pass_rate = self._rates.optimizer_bytes_per_s or self._rates.memory_bytes_per_s
        ids = bags * option.table.pooling_factor
        passes_s = table_bytes * (passes / pass_rate + self._rates.replica_value_s / 4)
        return (
            0.0,
            self._lookup_s(option, ids, bags),
            0.0,
            self._all_reduce_s(table_bytes, with_latency=False),
            self._update_s(option, ids, bags) + passes_s,
        )

    def _lookup_s(self, option: Option, ids: float, bags: float) -> float:
        """Rows read and pooled.

        fused_uvm reads each row over the host link. fused_uvm_caching reads those that the cache lacks and writes as
        many back; ids are taken for uniform, so a share of 1 - cache_load_factor: the worst case.
        """
        row_bytes = BYTES_PER_VALUE[option.table.precision] * option.shard_columns
        touched = touched_row_bytes(BYTES_PER_VALUE[option.table.precision], option.shard_columns, "")
        seconds = self._kernel_s(self._rates.lookup, option, ids, bags, touched)
        if option.kernel == "fused_uvm":
            return seconds + ids * row_bytes / self._rates.host_memory_bytes_per_s
        if option.kernel == "fused_uvm_caching":
            misses = ids * (1 - (option.cache_load_factor or 0.0))
            seconds += 2 * misses * row_bytes / self._rates.host_memory_bytes_per_s
        return seconds

    def _update_s(self, option: Option, ids: float, bags: float) -> float:
        """Gradients gathered for each id; each row that was asked for read and written once with its state."""
        value_bytes = BYTES_PER_VALUE[option.table.precision]
        touched = touched_row_bytes(value_bytes, option.shard_columns, self.job.sparse_optimizer)
        seconds = self._kernel_s(self._update_rates, option, ids, bags, touched)
        if option.kernel == "fused_uvm":
            seconds += 2 * ids * touched / self._rates.host_memory_bytes_per_s
        return seconds

    def _kernel_s(self, kernel: KernelRates, option: Option, ids: float, bags: float, touched_bytes: float) -> float:
        return kernel_s(
            kernel,
            num_rows=option.shard_rows,
            num_columns=option.shard_columns,
            num_ids=ids,
            num_bags=bags,
            row_bytes=BYTES_PER_VALUE[option.table.precision] * option.shard_columns,
            touched_bytes=touched_bytes,
        )

    def _spread_s_per_byte(self, num_ranks: int, bytes_per_s: float) -> float:
        """Seconds for each byte that a rank spreads evenly over `num_ranks`, itself included.

        Ranks of the own host and of others are sent to at once, each over its own link.
        """
        on_host = min(num_ranks, self._per_host)
        inside = (on_host - 1) / num_ranks / bytes_per_s
        across = (num_ranks - on_host) / num_ranks / self._rates.inter_host_bytes_per_s if num_ranks > on_host else 0.0
        return max(inside, across)

    def _all_reduce_s(self, num_bytes: float, *, with_latency: bool = True) -> float:
        """All ranks of the job: 2 (G - 1) / G of the bytes inside a host, then 2 (H - 1) / H / G between hosts."""
        per_host, num_hosts = self.cluster.ranks_per_node, self.cluster.num_nodes
        if self.cluster.num_ranks == 1:
            return 0.0
        rates, seconds = self._rates, 0.0
        if with_latency:
            seconds += rates.all_reduce_latency_s or rates.all_to_all_latency_s
            seconds += rates.inter_host_latency_s if num_hosts > 1 else 0.0
        seconds += 2 * (per_host - 1) / per_host * num_bytes / rates.all_reduce_bytes_per_s
        if num_hosts > 1:
            share = 2 * (num_hosts - 1) / num_hosts / per_host
            seconds += share * num_bytes / rates.inter_host_bytes_per_s
        return seconds

    @cached_property
    def _dense_s(self) -> float:
        return dense_s(self.job, self._rates, self._local_batch)

    @cached_property
    def _dense_optimizer_s(self) -> float:
        return dense_optimizer_s(self.job, self._rates)

    def _overhead_s(self, options: Sequence[Option]) -> float:
        """Fixed times: of the step, of each table, and of each sharding group with its collectives."""
        rates = self._rates
        groups = {(option.sharding_type, option.kernel, option.table.precision) for option in options}
        types = {sharding_type for sharding_type, *_ in groups}
        seconds = rates.step_s + self._local_batch * rates.sample_s + len(groups) * rates.group_s
        seconds += rates.row_group_s * len(types & ROW_TYPES) + sum(map(self.option_seconds, options))
        if self._num_ranks > 1:
            is_wide = self._num_ranks > self._per_host
            latency = rates.inter_host_latency_s if is_wide else rates.all_to_all_latency_s
            seconds += COLLECTIVES * latency * len(types - {"data_parallel"})
            # The gradients of all replicated tables travel together.
            seconds += self._all_reduce_s(0.0) if "data_parallel" in types else 0.0
        return seconds

    def _replica_sync_s(self, options: Sequence[Option], sync_every_steps: int | None) -> float:
        """Averaging the tables of all groups: each rank all-reduces its shards with its peers of the other groups."""
        num_groups = self.cluster.num_groups
        if num_groups == 1 or not sync_every_steps:
            return 0.0
        per_rank = sum(option.table.weights_bytes for option in options) / self._num_ranks
        is_wide = self.cluster.num_nodes > 1
        rate = self._rates.inter_host_bytes_per_s if is_wide else self._rates.all_reduce_bytes_per_s
        return 2 * (num_groups - 1) / num_groups * per_rank / rate / sync_every_steps

    def predict_step(
        self,
        rank_phases_WP: np.ndarray,
        options: Sequence[Option],
        sync_every_steps: int | None,
    ) -> StepPrediction:
        """Return the seconds of a step: each segment the longest over the ranks, less what hides behind other work.

        As TrainPipelineSparseDist runs it: the next batch's ids travel behind the dense part, pooled embeddings behind
        the bottom MLP, the dense gradients' all-reduce behind the embeddings' backward pass; of each, `Rates.overlap`.
        """
        longest = dict(zip(PHASES, rank_phases_WP.max(axis=0).tolist(), strict=True))
        phases = Phases(**longest)
        all_reduce_s = self._all_reduce_s(4 * self.job.dense.num_parameters)
        hidden_s = self._rates.overlap * (
            min(phases.input_dist_s, self._dense_s)
            + min(phases.output_dist_s, BOTTOM_SHARE * self._dense_s / (1 + BACKWARD_WORK))
            + min(all_reduce_s, phases.gradient_dist_s + phases.update_s)
        )
        overhead_s = self._overhead_s(options)
        replica_sync_s = self._replica_sync_s(options, sync_every_steps)
        work_s = phases.total_s + self._dense_s + all_reduce_s + self._dense_optimizer_s + overhead_s
        return StepPrediction(
            phases=phases,
            dense_s=self._dense_s,
            all_reduce_s=all_reduce_s,
            dense_optimizer_s=self._dense_optimizer_s,
            overhead_s=overhead_s,
            replica_sync_s=replica_sync_s,
            hidden_s=hidden_s,
            total_s=work_s + replica_sync_s - hidden_s,
        )


def dense_s(job: Job, rates: Rates, local_batch: float) -> float:
    """Return the seconds of the dense part, matrix products and interaction, forward and backward.

    The products of N vectors of d, N^2 d, are taken forward and once more backward; copying the vectors and picking
    among N^2 products likewise. Of activations, each value and its gradient is written and read.
    """
    dense = job.dense
    rate = rates.matmul_fp32_flops_per_s if job.precision == "fp32" else rates.matmul_bf16_flops_per_s
    flops = 2 * sum(inputs * outputs for inputs, outputs in dense.layers)
    seconds = (1 + BACKWARD_WORK) * flops * local_batch / rate + len(dense.layers) * rates.layer_s
    activation_bytes = 4 * BYTES_PER_VALUE[job.precision] * dense.activation_values
    seconds += local_batch * activation_bytes / (rates.activation_bytes_per_s or rates.memory_bytes_per_s)
    if not dense.num_interacting:
        return seconds
    num_vectors, dim = dense.num_interacting, dense.interaction_dim
    interaction_flops = 2 * 2 * num_vectors**2 * dim
    interaction_bytes = 2 * 4 * (num_vectors * dim + num_vectors**2)
    seconds += local_batch * interaction_flops / (rates.interaction_flops_per_s or rates.matmul_fp32_flops_per_s)
    return seconds + local_batch * interaction_bytes / (rates.interaction_bytes_per_s or rates.memory_bytes_per_s)


def dense_optimizer_s(job: Job, rates: Rates) -> float:
    """Return the seconds in which weights and state are read and written, gradients cleared, written and read."""
    state_bytes = DENSE_STATE_BYTES[job.dense_optimizer]
    rate = rates.optimizer_bytes_per_s or rates.memory_bytes_per_s
    return job.dense.num_parameters * (5 * 4 + 2 * state_bytes) / rate


def touched_row_bytes(value_bytes: int, num_columns: int, optimizer: str) -> float:
    """Return the bytes of memory behind one row and the optimizer's state of it; "" for a lookup, which needs none."""
    per_weight, per_row = SPARSE_STATE_BYTES.get(optimizer, (0, 0))
    state_bytes = per_weight * num_columns + (NEAREST_TOUCHED_BYTES if per_weight or per_row else 0)
    return value_bytes * num_columns + NEAREST_TOUCHED_BYTES + state_bytes


def kernel_s(
    kernel: KernelRates,
    *,
    num_rows: int,
    num_columns: int,
    num_ids: float,
    num_bags: float,
    row_bytes: int,
    touched_bytes: float,
) -> float:
    """Return the seconds of a kernel over the ids of one shard, whose rows fall into bags.

    Of R rows, n ids drawn evenly touch R (1 - exp(-n / R)) at least once.
    """
    num_touched = -num_rows * expm1(-num_ids / num_rows)
    touch_s = num_touched * touched_bytes * kernel.touch_s_per_byte(num_rows * touched_bytes)
    moved_bytes = num_ids * row_bytes + 4 * num_bags * num_columns
    return num_ids * kernel.row_s + num_bags * kernel.bag_s + moved_bytes / kernel.bytes_per_s + touch_s


_latest: list[CostModel] = []


def _model_of(job: Job, cluster: Cluster) -> CostModel:
    """The latest model is kept: searches ask for thousands of options of one job."""
    if not _latest or _latest[0].job is not job or _latest[0].cluster is not cluster:
        _latest[:] = [CostModel(job, cluster)]
    return _latest[0]
