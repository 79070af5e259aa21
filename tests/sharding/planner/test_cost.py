import math
from dataclasses import replace

import numpy as np
import pytest

from papilio.sharding.config import CommunicationConfig
from papilio.sharding.hardware import RATE_NAMES, Figure, Hardware, RatesEntry
from papilio.sharding.planner.cost import PHASES, option_seconds, predict_step, shard_seconds
from papilio.sharding.planner.job import Cluster, DenseWork, Job, Table
from papilio.sharding.planner.options import Option

TABLE = Table("t_a", "m", "a", num_embeddings=1000, embedding_dim=8, pooling_factor=3)
NO_DENSE = DenseWork((), 0, 0, 0, 0)
INPUT, LOOKUP, OUTPUT, GRADIENT, UPDATE = range(5)


def cluster(num_nodes: int = 1, ranks_per_node: int = 2, num_groups: int = 1, **figures: float) -> Cluster:
    """Ranks for whom nothing costs anything but what is given."""
    values = {name: 1e30 if name.endswith("_per_s") else 0.0 for name in RATE_NAMES} | figures
    entry = RatesEntry(ranks_per_host=ranks_per_node, figures={name: _figure(v) for name, v in values.items()})
    memory = _figure(1e12)
    hardware = Hardware(
        name="test",
        description="",
        device="cpu",
        ranks_per_host=ranks_per_node,
        device_memory=memory,
        host_memory=memory,
        framework_memory=memory,
        rates=(entry,),
    )
    return Cluster(hardware, num_nodes, ranks_per_node, num_groups)


def _figure(value: float) -> Figure:
    return Figure(value=value, unit="1", source="test", date="2026")


def job(table: Table = TABLE, batch: int = 64, dense: DenseWork = NO_DENSE, **others: object) -> Job:
    return replace(Job((table,), dense, 0, batch), **others)  # type: ignore[arg-type]


def option(sharding_type: str, rows: int = 1, columns: int = 1, kernel: str = "fused") -> Option:
    return Option(TABLE, sharding_type, kernel, rows, columns)


def test_the_owner_of_a_whole_table_looks_up_all_ids_and_sends_pooled_vectors() -> None:
    """2 ranks x 32 samples: 192 ids in 64 bags of 8 values."""
    ids_only = shard_seconds(option("table_wise"), job(), cluster(lookup_row_s=1.0))
    assert ids_only[LOOKUP] == 192
    bytes_only = shard_seconds(option("table_wise"), job(), cluster(lookup_bytes_per_s=1.0))
    assert bytes_only[LOOKUP] == pytest.approx(192 * 32 + 64 * 32)
    sent = shard_seconds(option("table_wise"), job(), cluster(all_to_all_bytes_per_s=1.0))
    # Half goes to the other rank; ids and lengths are int32, values fp32.
    assert sent.tolist() == pytest.approx([(192 * 4 + 64 * 4) / 2, 0, 64 * 8 * 4 / 2, 64 * 8 * 4 / 2, 0])


def test_a_column_shard_looks_up_all_ids_of_fewer_columns() -> None:
    whole = shard_seconds(option("column_wise"), job(), cluster(lookup_bytes_per_s=1.0, update_row_s=1.0))
    half = shard_seconds(option("column_wise", columns=2), job(), cluster(lookup_bytes_per_s=1.0, update_row_s=1.0))
    assert half[LOOKUP] == pytest.approx(whole[LOOKUP] / 2)
    assert half[UPDATE] == whole[UPDATE] == 192


def test_row_shards_share_the_ids_and_pool_all_bags() -> None:
    shard = option("row_wise", rows=2)
    assert shard_seconds(shard, job(), cluster(lookup_row_s=1.0))[LOOKUP] == 96
    assert shard_seconds(shard, job(), cluster(lookup_bag_s=1.0))[LOOKUP] == 64
    # Partial sums of all 64 bags of 8 fp32 values, of which half stays.
    assert shard_seconds(shard, job(), cluster(reduce_scatter_bytes_per_s=1.0))[OUTPUT] == pytest.approx(64 * 32 / 2)
    assert shard_seconds(shard, job(), cluster(all_gather_bytes_per_s=1.0))[GRADIENT] == pytest.approx(64 * 32 / 2)


def test_a_row_that_is_asked_for_often_is_touched_once() -> None:
    small = replace(TABLE, num_embeddings=10)
    touched = shard_seconds(
        Option(small, "table_wise", "fused"), job(small), cluster(lookup_touch_1mib_bytes_per_s=1.0)
    )
    # All 10 rows, each its 32 bytes and the 64 that come with them; 960 of 2**20 bytes stay nearer.
    assert touched[LOOKUP] == pytest.approx(960 * 960 / 2**20, rel=1e-6)


def test_the_update_touches_the_optimizers_state() -> None:
    figures = {f"update_touch_{size}_bytes_per_s": 1.0 for size in ("1mib", "32mib", "1gib")}
    big = replace(TABLE, num_embeddings=10**9)
    seconds = {
        name: shard_seconds(Option(big, "table_wise", "fused"), job(big, sparse_optimizer=name), cluster(**figures))
        for name in ("sgd", "rowwise_adagrad", "adagrad")
    }
    assert seconds["sgd"][UPDATE] == pytest.approx(192 * (32 + 64), rel=1e-4)
    assert seconds["rowwise_adagrad"][UPDATE] == pytest.approx(192 * (32 + 64 + 64), rel=1e-4)
    assert seconds["adagrad"][UPDATE] == pytest.approx(192 * (32 + 64 + 32 + 64), rel=1e-4)


def test_between_hosts_the_slower_link_decides() -> None:
    """4 ranks on 2 hosts: a quarter goes to the neighbour, half to the other host, at once."""
    ranks = cluster(2, 2, all_to_all_bytes_per_s=1.0, inter_host_bytes_per_s=1.0)
    values_bytes = 64 * 8 * 4
    assert shard_seconds(option("table_wise"), job(), ranks)[OUTPUT] == pytest.approx(values_bytes / 2)
    # Row shards of one host: half their sums to the neighbour, then their own bags' share to the other host.
    shard = option("table_row_wise", rows=2)
    assert shard_seconds(shard, job(), ranks)[OUTPUT] == pytest.approx(values_bytes / 2 + values_bytes / 2 / 2)


def test_a_replica_pays_for_its_whole_table() -> None:
    ranks = cluster(all_reduce_bytes_per_s=1.0)
    assert shard_seconds(option("data_parallel", kernel="dense"), job(), ranks)[GRADIENT] == pytest.approx(1000 * 8 * 4)
    lookup = shard_seconds(option("data_parallel", kernel="dense"), job(), cluster(lookup_row_s=1.0))[LOOKUP]
    assert lookup == 32 * 3
    pass_s = shard_seconds(option("data_parallel", kernel="dense"), job(), cluster(memory_bytes_per_s=1.0))[UPDATE]
    assert pass_s == pytest.approx(5 * 1000 * 8 * 4)


def test_one_rank_sends_nothing() -> None:
    ranks = cluster(1, 1, all_to_all_bytes_per_s=1.0, all_reduce_bytes_per_s=1.0, all_to_all_latency_s=1.0)
    dense = DenseWork(((8, 8),), 64, 0, 0, 0)
    found = predict_step(np.zeros((1, 5)), [option("table_wise")], job(dense=dense), ranks)
    assert shard_seconds(option("table_wise"), job(), ranks).sum() == pytest.approx(0, abs=1e-20)
    assert found.total_s == pytest.approx(0, abs=1e-20)


def test_fewer_bytes_travel_in_lower_precision() -> None:
    lower = job(communication=CommunicationConfig(forward="fp16", backward="int8"))
    ranks = cluster(all_to_all_bytes_per_s=1.0)
    before, after = (shard_seconds(option("table_wise"), found, ranks) for found in (job(), lower))
    assert after[OUTPUT] == before[OUTPUT] / 2
    assert after[GRADIENT] == before[GRADIENT] / 4


def test_rows_in_host_memory_come_over_the_link() -> None:
    ranks = cluster(host_memory_bytes_per_s=1.0)
    in_host = shard_seconds(option("table_wise", kernel="fused_uvm"), job(), ranks)
    cached = shard_seconds(
        replace(option("table_wise", kernel="fused_uvm_caching"), cache_load_factor=0.75), job(), ranks
    )
    assert in_host[LOOKUP] == 192 * 32
    # A quarter is not in the cache; as many rows are written back.
    assert cached[LOOKUP] == pytest.approx(2 * 0.25 * 192 * 32)
    assert shard_seconds(option("table_wise"), job(), ranks)[LOOKUP] == pytest.approx(0, abs=1e-20)


def test_each_rank_pays_for_its_ids_once_for_each_column_block() -> None:
    ranks = cluster(id_s=1.0, bucketize_id_s=10.0)
    assert option_seconds(option("table_wise"), job(), ranks) == 32 * 3
    assert option_seconds(option("column_wise", columns=2), job(), ranks) == 2 * 32 * 3
    assert option_seconds(option("row_wise", rows=2), job(), ranks) == 11 * 32 * 3


def test_a_segment_lasts_as_long_as_on_its_slowest_rank() -> None:
    phases = np.array([[1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    found = predict_step(phases, [option("table_wise")], job(), cluster())
    assert [getattr(found.phases, name) for name in PHASES] == [5, 4, 3, 4, 5]
    assert found.total_s == pytest.approx(21)


def test_the_dense_part_is_three_forward_passes_and_its_gradients_are_reduced() -> None:
    dense = DenseWork(((8, 16), (16, 4)), 192, 0, 0, 0)
    phases, options = np.zeros((2, 5)), [option("table_wise")]
    found = predict_step(phases, options, job(dense=dense), cluster(matmul_fp32_flops_per_s=1.0))
    assert found.dense_s == pytest.approx(3 * 2 * (8 * 16 + 16 * 4) * 32)
    found = predict_step(phases, options, job(dense=dense), cluster(all_reduce_bytes_per_s=1.0))
    assert found.all_reduce_s == pytest.approx(192 * 4)
    found = predict_step(phases, options, job(dense=dense, dense_optimizer="adam"), cluster(memory_bytes_per_s=1.0))
    assert found.dense_optimizer_s == pytest.approx(192 * (5 * 4 + 2 * 8))


def test_fixed_times_are_counted_by_step_group_and_table() -> None:
    options = [option("table_wise"), option("table_wise"), option("row_wise", rows=2)]
    found = predict_step(np.zeros((2, 5)), options, job(), cluster(step_s=1000.0, group_s=100.0, table_s=1.0))
    assert found.overhead_s == 1000 + 2 * 100 + 3


def test_overlap_hides_no_more_than_there_is_to_hide_behind() -> None:
    dense = DenseWork(((8, 16),), 128, 0, 0, 0)
    phases = np.array([[7.0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    figures = {"matmul_fp32_flops_per_s": 3 * 2 * 128 * 32 / 4.0}  # 4 s of dense work
    for overlap in (0.0, 0.5, 1.0):
        found = predict_step(phases, [option("table_wise")], job(dense=dense), cluster(overlap=overlap, **figures))
        assert found.hidden_s == pytest.approx(overlap * 4)
        assert found.total_s == pytest.approx(11 - overlap * 4)


def test_groups_average_their_tables() -> None:
    ranks = cluster(1, 4, num_groups=2, all_reduce_bytes_per_s=1.0)
    phases, options = np.zeros((2, 5)), [option("table_wise")]
    every_step = predict_step(phases, options, job(), ranks).replica_sync_s
    assert every_step == pytest.approx(1000 * 8 * 4 / 2)
    assert predict_step(phases, options, job(), ranks, sync_every_steps=10).replica_sync_s == every_step / 10
    assert predict_step(phases, options, job(), ranks, sync_every_steps=None).replica_sync_s == 0
    assert math.isclose(shard_seconds(option("table_wise"), job(), ranks).sum(), 0, abs_tol=1e-20)
