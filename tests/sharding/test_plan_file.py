"""Plan files: there and back exactly, and refused on another model, other ranks or another version."""

import json

import pytest
import torch

from sharding.plan_conversion import check_plan, to_sharding_plan
from sharding.plan_file import PlanFileError, plan_from_json, read_plan_file
from sharding.planning.errors import PlanError
from sharding.planning.make import make_plan
from tests.support.jobs import config_of, make_cluster, make_job

CPU = torch.device("cpu")
TYPES = [
    "data_parallel",
    "table_wise",
    "row_wise",
    "column_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
]


def plan_of(job=None, cluster=None, **settings):
    job, cluster = job or make_job(), cluster or make_cluster()
    return make_plan(job, cluster, config_of(**settings), recipe="r", papilio_version="0.1")


def changed(plan, **values):
    tree = json.loads(plan.to_json()) | values
    return plan_from_json(json.dumps(tree), "plan.json")


def refusal(plan, job=None, cluster=None):
    with pytest.raises(PlanError) as error:
        check_plan(plan, job or make_job(), cluster or make_cluster(), "plan.json")
    return str(error.value)


@pytest.mark.parametrize("sharding_type", TYPES)
def test_a_plan_comes_back_from_its_file_exactly(sharding_type, tmp_path):
    cluster = make_cluster(num_nodes=2, ranks_per_node=2)
    plan = plan_of(make_job(dim=64), cluster, types=[sharding_type])
    assert {table.sharding_type for table in plan.tables} == {sharding_type}
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json(), "utf-8")
    again = read_plan_file(str(path))
    assert again == plan
    assert again.to_json() == plan.to_json()
    check_plan(again, make_job(dim=64), cluster, "plan.json")
    assert to_sharding_plan(again, CPU).plan == to_sharding_plan(plan, CPU).plan


def test_shards_are_where_torchrec_cuts_them():
    cluster = make_cluster(num_nodes=2, ranks_per_node=2)
    plan = plan_of(make_job((10,), dim=64), cluster, types=["grid_shard"], min_partition=32)
    (table,) = plan.tables
    places = [(s.row, s.column, s.num_rows, s.num_columns) for s in table.shards]
    assert places == [(0, 0, 5, 32), (5, 0, 5, 32), (0, 32, 5, 32), (5, 32, 5, 32)]
    assert sorted(table.ranks) == [0, 1, 2, 3]
    assert {table.ranks[0] // 2, table.ranks[2] // 2} == {0, 1}, "a column block on each host"


def test_the_sharding_plan_has_the_kernel_the_cache_and_each_place():
    plan = plan_of(kernels=["fused_uvm_caching"], cache_load_factor=0.25, types=["table_wise"])
    sharding = to_sharding_plan(plan, torch.device("cuda")).plan["model.tables"]["t_2"]
    assert sharding.compute_kernel == "fused_uvm_caching"
    assert sharding.cache_params.load_factor == 0.25
    (shard,) = sharding.sharding_spec.shards
    rank = sharding.ranks[0]
    assert str(shard.placement) == f"rank:{rank}/cuda:{rank}"
    assert shard.shard_sizes == [3_000, 16]


def test_another_version_is_refused():
    with pytest.raises(
        PlanFileError, match=r"plan.json has format version 99 \(written by Papilio 0.1\); this Papilio reads"
    ):
        changed(plan_of(), format_version=99)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is damaged"), ("[]", "has format version None"), ('{"format_version": 3}', "is damaged .papilio_version")],
)
def test_a_damaged_file_is_refused(text, message):
    with pytest.raises(PlanFileError, match=message):
        plan_from_json(text, "plan.json")


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(PlanFileError, match=r"does not exist; `papilio plan --recipe R --output"):
        read_plan_file(str(tmp_path / "none.json"))


def test_other_ranks_are_refused():
    message = refusal(plan_of(), cluster=make_cluster(num_nodes=2))
    assert message.startswith(
        "plan.json was made for 1 node(s) of 4 rank(s), this job has 2 node(s) of 4 rank(s); make"
    )


def test_replicas_of_a_table_are_refused_in_groups():
    plan = plan_of(cluster=make_cluster(ranks_per_node=2), types=["data_parallel"])
    machine = json.loads(plan.to_json())["machine"] | {"ranks_per_node": 4, "num_groups": 2}
    message = refusal(changed(plan, machine=machine), cluster=make_cluster(num_groups=2))
    assert "plan.json: table t_0 is data_parallel, but sharding.replicas has groups" in message


def test_another_device_is_refused():
    message = refusal(plan_of(), cluster=make_cluster(hardware="cpu_host"))
    assert "plan.json was made for cuda (dgx_a100), this job runs on cpu" in message


def test_another_model_is_refused_by_its_tables():
    assert "it does not place t_3; make the plan again" in refusal(plan_of(), job=make_job((1_000, 2_000, 3_000, 4)))
    assert "it places t_2; make" in refusal(plan_of(), job=make_job((1_000, 2_000)))
    message = refusal(plan_of(), job=make_job((1_000, 2_001, 3_000)))
    assert "table t_1 has num_embeddings 2000 there and 2001 here" in message
    assert "has embedding_dim 16 there and 32 here" in refusal(plan_of(), job=make_job(dim=32))


def with_shard(plan, **values):
    tree = json.loads(plan.to_json())
    tree["tables"][1]["shards"][0] |= values
    return plan_from_json(json.dumps(tree), "plan.json")


def test_shards_that_leave_weights_out_or_overlap_are_refused():
    plan = plan_of(types=["row_wise"])
    assert "the shards of table t_1 cover 31984 of its 32000 weights" in refusal(with_shard(plan, num_rows=499))
    assert "cover 32000 of its 32000 weights, not all of them just once" in refusal(with_shard(plan, row=500))
    assert "a shard of table t_1 reaches beyond the table" in refusal(with_shard(plan, row=1_900))


def test_ranks_that_do_not_match_the_shards_are_refused():
    message = refusal(
        with_shard(plan_of(types=["table_wise"]), rank=3 - plan_of(types=["table_wise"]).tables[1].ranks[0])
    )
    assert "the ranks of table t_1 are not those of its shards" in message
