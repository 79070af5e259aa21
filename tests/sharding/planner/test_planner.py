"""Whole plans: what they count, what they choose, and what is said when a job does not fit."""

import re

import numpy as np
import pytest

from papilio.sharding.planner.errors import PlanError
from papilio.sharding.planner.explain import explain_table
from papilio.sharding.planner.make import make_plan
from papilio.sharding.planner.memory import KINDS, shard_bytes
from papilio.sharding.planner.options import Option, enumerate_options
from papilio.sharding.planner.planner import predict, prepare, solve
from tests.support.jobs import GIB, config_of, make_cluster, make_job, make_tables

TYPES = ("table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "grid_shard", "data_parallel")


def options_of(dim, cluster, types=TYPES, kernels=("fused",), min_partition=16):
    (table,) = make_tables((1_000,), dim)
    found = enumerate_options(
        table, cluster, types=types, kernels=kernels, min_partition=min_partition, cache_load_factor=0.2
    )
    return [(option.sharding_type, option.num_column_shards, option.num_row_shards) for option in found]


def test_all_options_on_two_hosts_of_two():
    cluster = make_cluster(num_nodes=2, ranks_per_node=2)
    assert options_of(64, cluster) == [
        ("table_wise", 1, 1),
        ("row_wise", 1, 4),
        ("column_wise", 2, 1),
        ("column_wise", 4, 1),
        ("table_row_wise", 1, 2),
        ("table_column_wise", 2, 1),
        ("grid_shard", 2, 2),
        ("data_parallel", 1, 1),
    ]


def test_on_one_host_types_that_come_to_the_same_are_listed_once():
    listed = {sharding_type for sharding_type, _, _ in options_of(64, make_cluster(ranks_per_node=2))}
    assert listed == {"table_wise", "row_wise", "column_wise", "data_parallel"}
    assert {t for t, _, _ in options_of(64, make_cluster(ranks_per_node=1))} == {"table_wise"}


def test_a_type_that_stands_alone_is_kept_even_where_it_cuts_nothing():
    assert options_of(8, make_cluster(), types=("column_wise",)) == [("column_wise", 1, 1)]
    assert options_of(8, make_cluster(ranks_per_node=2), types=("table_row_wise",)) == [("table_row_wise", 1, 2)]


def test_column_blocks_are_equal_and_multiples_of_four():
    assert options_of(48, make_cluster(ranks_per_node=8), types=("column_wise",), min_partition=4) == [
        ("column_wise", blocks, 1) for blocks in (2, 3, 4, 6)
    ]


@pytest.mark.parametrize(
    ("optimizer", "state_bytes"), [("sgd", 0), ("rowwise_adagrad", 4 * 250), ("adagrad", 4 * 250 * 32)]
)
def test_a_shard_holds_its_weights_and_their_state(optimizer, state_bytes):
    # 1,000 rows over the 4 ranks of a host, 64 columns in 2 blocks: 250 x 32 weights of 4 bytes.
    (table,) = make_tables((1_000,), 64)
    option = Option(table, "grid_shard", "fused", num_row_shards=4, num_column_shards=2)
    use = dict(zip(KINDS, shard_bytes(option, make_job((1_000,), optimizer=optimizer), make_cluster(2)), strict=True))
    assert (use["weights_bytes"], use["optimizer_bytes"]) == (4 * 250 * 32, state_bytes)


def test_uvm_puts_weights_on_the_host_and_a_cache_on_the_device():
    (table,) = make_tables((1_000,), 64)
    option = Option(table, "table_wise", "fused_uvm_caching", cache_load_factor=0.25)
    use = dict(zip(KINDS, shard_bytes(option, make_job(optimizer="adagrad"), make_cluster()), strict=True))
    assert use["host_bytes"] == 2 * 4 * 64_000
    assert use["cache_bytes"] == 0.25 * 4 * 64_000
    assert use["weights_bytes"] == use["optimizer_bytes"] == 0


def test_a_plan_adds_up_over_its_ranks():
    plan = make_plan(make_job(), make_cluster(), config_of(), recipe="r", papilio_version="0")
    assert sum(rank.memory.weights_bytes for rank in plan.ranks) == 4 * 16 * 6_000
    assert sum(table.weights_bytes for table in plan.tables) == 4 * 16 * 6_000
    assert sum(table.optimizer_bytes for table in plan.tables) == 4 * 6_000
    by_rank = np.zeros(4)
    for table in plan.tables:
        for shard in table.shards:
            by_rank[shard.rank] += table.phases.total_s
    np.testing.assert_allclose(by_rank, [rank.phases.total_s for rank in plan.ranks])
    parts = plan.step
    assert parts.total_s == pytest.approx(
        parts.phases.total_s
        + parts.dense_s
        + parts.all_reduce_s
        + parts.dense_optimizer_s
        + parts.overhead_s
        + parts.replica_sync_s
        - parts.hidden_s
    )


def test_the_same_job_gives_the_same_text():
    first, second = (
        make_plan(make_job((900,) * 30), make_cluster(), config_of(), recipe="r", papilio_version="0").to_json()
        for _ in range(2)
    )
    assert first == second


def test_of_plans_that_predictions_do_not_tell_apart_the_one_with_fewest_shards_is_taken():
    tables = make_plan(
        make_job((1_000,) * 8, dim=64), make_cluster(), config_of(), recipe="r", papilio_version="0"
    ).tables
    fastest = min(
        make_plan(
            make_job((1_000,) * 8, dim=64), make_cluster(), config_of(types=[kind]), recipe="r", papilio_version="0"
        ).step.total_s
        for kind in ("table_wise", "row_wise", "column_wise")
    )
    whole = make_plan(
        make_job((1_000,) * 8, dim=64), make_cluster(), config_of(types=["table_wise"]), recipe="r", papilio_version="0"
    )
    assert whole.step.total_s <= 1.1 * fastest
    assert {table.sharding_type for table in tables} == {"table_wise"}


def test_a_table_too_big_for_a_rank_is_cut():
    big = (60_000_000, 1_000, 1_000)  # 57 GiB of weights and 0.2 GiB of state at dim 256
    plan = make_plan(
        make_job(big, dim=256), make_cluster(), config_of(), recipe="r", papilio_version="0", memory_bytes=30 * GIB
    )
    table = plan.tables[0]
    assert len(table.shards) > 1
    assert all(rank.memory.device_bytes <= 0.9 * 30 * GIB for rank in plan.ranks)


def failure(job, cluster, memory_gib, **settings):
    with pytest.raises(PlanError) as error:
        make_plan(
            job,
            cluster,
            config_of(**settings),
            recipe="r",
            papilio_version="0",
            memory_bytes=int(memory_gib * GIB),
        )
    return str(error.value)


def ways_of(message):
    return re.findall(r"^  (\w.*): ([\d,.]+) ms a step, ([\d,]+) samples/s\n      (.*)$", message, re.MULTILINE)


def test_what_does_not_fit_is_told_with_remediation_that_do_fit():
    # Two tables of 8 GiB on two ranks of 6 GiB: only cutting them, or making them smaller, helps.
    job, cluster = make_job((16 << 20, 16 << 20, 1_000), dim=128), make_cluster(ranks_per_node=2)
    message = failure(job, cluster, 6, types=["table_wise"])
    assert "the tables do not fit 2 rank(s) of dgx_a100: they need at least 16." in message
    assert "6.0 GiB a rank, 10% of it kept free" in message
    assert re.search(r"No room for 2 of 3, first for t_[01]: 8\.\d+ GiB on a rank at the least \(table_wise\)", message)
    ways = {words: setting for words, _, _, setting in ways_of(message)}
    assert set(ways) == {"with UVM caching at 0.2"}, "16 GiB do not fit two ranks of 5.4, however cut"
    plan = make_plan(
        job,
        cluster,
        config_of(types=["table_wise"], kernels=["fused", "fused_uvm_caching"]),
        recipe="r",
        papilio_version="0",
        memory_bytes=6 * GIB,
    )
    assert all(rank.memory.device_bytes <= 0.9 * 6 * GIB for rank in plan.ranks)


def test_remediation_are_ranked_by_speed_and_name_the_tables():
    job, cluster = make_job((16 << 20, 1_000, 1_000), dim=128), make_cluster(ranks_per_node=4)
    message = failure(job, cluster, 7, types=["table_wise"])
    ways = ways_of(message)
    rates = [int(rate.replace(",", "")) for _, _, rate, _ in ways]
    assert rates == sorted(rates, reverse=True)
    assert any(re.fullmatch(r"with (row|column)_wise on t_0", words) for words, _, _, _ in ways)
    assert ("--model.table_precision=fp16") in {setting for _, _, _, setting in ways}


def test_more_gpus_are_counted_exactly():
    # 24 GiB row-wise over ranks of 5 GiB, 4.5 usable, 1.5 of them taken by the framework: at least 8 ranks and a bit.
    job = make_job((48 << 20,), dim=128)
    message = failure(job, make_cluster(num_nodes=1, ranks_per_node=8), 5, types=["row_wise"], kernels=["fused"])
    setting = next(setting for words, _, _, setting in ways_of(message) if words.startswith("with 16 GPUs"))
    assert setting == "--num-nodes 2"


def test_a_dense_part_that_does_not_fit_is_told():
    message = failure(make_job(batch_size=64), make_cluster(), 1.0)
    assert "before any table a rank needs 1.5 GiB" in message


@pytest.fixture
def planned():
    planning = prepare(
        make_job((1_000_000, 50, 50), dim=64, batch_size=4_096), make_cluster(2), config_of(types=["table_wise"])
    )
    return planning, solve(planning)


def test_explaining_lists_every_type_with_its_step(planned):
    planning, solution = planned
    reports = explain_table(planning, solution, "t_0")
    assert reports[0].is_chosen
    assert reports[0].reason == "chosen"
    assert {report.option.sharding_type for report in reports} == set(TYPES)
    assert [report.is_chosen for report in reports].count(True) == 1
    for report in reports[1:]:
        if report.option.sharding_type != "table_wise" or report.option.kernel != "fused":
            cuts = report.option.num_column_shards > 1  # and the job's optimizer keeps one number a row
            why = "only where a constraint of the table names it, since " if cuts else "not allowed by the recipe; "
            assert report.reason.startswith(why)


def test_an_explained_step_is_that_of_a_plan_made_so(planned):
    planning, solution = planned
    report = next(
        r
        for r in explain_table(planning, solution, "t_0")
        if r.option.sharding_type == "row_wise" and r.option.kernel == "fused"
    )
    forced = config_of(types=["table_wise"], constraints=[{"tables": ["t_0"], "types": ["row_wise"]}])
    again = prepare(planning.job, planning.cluster, forced)
    assert report.step_ms == pytest.approx(predict(again, solve(again)).total_s * 1e3, rel=1e-3)


def test_explaining_says_what_does_not_fit():
    planning = prepare(make_job((16 << 20,), dim=128), make_cluster(), config_of(), memory_bytes=8 * GIB)
    reports = explain_table(planning, solve(planning), "t_0", memory_bytes=8 * GIB)
    whole = next(r for r in reports if r.option.sharding_type == "table_wise" and r.option.kernel == "fused")
    assert whole.step_ms is None
    assert re.search(r"does not fit: 8\.\d+ GiB on a rank, 5\.\d+ GiB free for all tables", whole.reason)


def test_explaining_an_unknown_table_names_the_nearest(planned):
    with pytest.raises(PlanError, match=r"--explain t_00: there is no such table; did you mean t_0\?"):
        explain_table(*planned, "t_00")
