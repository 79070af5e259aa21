"""What a recipe asks of the plan: kept, or refused by a message that names the constraint and the fix."""

import dataclasses

import pytest

from papilio.sharding.config import CommunicationConfig
from papilio.sharding.planner.constraints import resolve_constraints
from papilio.sharding.planner.errors import PlanError
from papilio.sharding.planner.make import make_plan
from papilio.sharding.reports.placement import describe_placement
from tests.support.jobs import config_of, make_cluster, make_job


def plan(job, cluster, **settings):
    made = make_plan(job, cluster, config_of(**settings), recipe="r", papilio_version="0")
    return {table.name: table for table in made.tables}


def refusal(job, cluster, **settings):
    with pytest.raises(PlanError) as error:
        resolve_constraints(config_of(**settings), job, cluster)
    return str(error.value)


def test_a_pattern_sets_the_type_of_the_tables_it_matches():
    tables = plan(
        make_job(), make_cluster(), types=["table_wise"], constraints=[{"tables": ["t_[12]"], "types": ["row_wise"]}]
    )
    assert {name: table.sharding_type for name, table in tables.items()} == {
        "t_0": "table_wise",
        "t_1": "row_wise",
        "t_2": "row_wise",
    }
    assert tables["t_1"].ranks == (0, 1, 2, 3)


def test_of_two_constraints_the_later_wins_field_by_field():
    tables = plan(
        make_job(),
        make_cluster(),
        constraints=[
            {"tables": ["t_*"], "types": ["table_wise"], "ranks": [1]},
            {"tables": ["t_2"], "ranks": [3]},
        ],
    )
    assert [(table.sharding_type, table.ranks) for table in tables.values()] == [
        ("table_wise", (1,)),
        ("table_wise", (1,)),
        ("table_wise", (3,)),
    ]


def test_tables_kept_together_share_a_rank():
    tables = plan(
        make_job((1_000,) * 8),
        make_cluster(),
        constraints=[{"tables": ["t_0", "t_3", "t_6"], "keep_together": True, "ranks": [2, 3]}],
    )
    together = {tables[name].ranks for name in ("t_0", "t_3", "t_6")}
    assert len(together) == 1
    assert together <= {(2,), (3,)}
    assert all(tables[name].sharding_type == "table_wise" for name in ("t_0", "t_3", "t_6"))


def test_min_partition_bounds_the_column_blocks():
    tables = plan(
        make_job(dim=64),
        make_cluster(),
        constraints=[{"tables": ["t_0"], "types": ["column_wise"], "min_partition": 32}],
    )
    assert [(shard.column, shard.num_columns) for shard in tables["t_0"].shards] == [(0, 32), (32, 32)]


def test_a_kernel_and_its_cache_go_into_the_plan():
    constraint = {"tables": ["t_2"], "kernels": ["fused_uvm_caching"], "cache_load_factor": 0.1}
    tables = plan(make_job(), make_cluster(), constraints=[constraint])
    assert (tables["t_2"].compute_kernel, tables["t_2"].cache_load_factor) == ("fused_uvm_caching", 0.1)
    assert tables["t_1"].cache_load_factor is None


def test_a_pattern_without_a_table_names_the_nearest():
    message = refusal(make_job(), make_cluster(), constraints=[{"tables": ["t_01"], "ranks": [0]}])
    assert message == "sharding.constraints[0]: no table matches 't_01'; the nearest is t_1"


def test_a_rank_that_does_not_exist_is_named():
    message = refusal(make_job(), make_cluster(), constraints=[{"tables": ["t_1"], "ranks": [0, 4]}])
    assert message == "sharding.constraints[0].ranks: there is no rank 4; tables are spread over ranks 0 to 3"


def test_row_wise_cannot_keep_to_some_ranks():
    constraint = {"tables": ["t_1"], "types": ["row_wise"], "ranks": [0]}
    message = refusal(make_job(), make_cluster(), constraints=[constraint])
    assert "sharding.constraints[0]: table t_1 cannot keep to ranks 0 with types row_wise" in message
    assert "allow table_wise or column_wise, or leave ranks out" in message


def test_uvm_needs_a_gpu():
    cluster = make_cluster(hardware="cpu_host", ranks_per_node=2)
    message = refusal(make_job(), cluster, kernels=["fused_uvm"])
    assert "table t_0: fused_uvm need a GPU; on a CPU the kernel is fused" in message


def test_tables_kept_together_must_be_allowed_whole():
    message = refusal(
        make_job(), make_cluster(), types=["row_wise"], constraints=[{"tables": ["t_*"], "keep_together": True}]
    )
    assert "sharding.constraints[0].keep_together: table t_0 may not be table_wise (types: row_wise)" in message


def test_tables_kept_together_need_a_rank_in_common():
    constraints = [
        {"tables": ["t_0"], "ranks": [0]},
        {"tables": ["t_1"], "ranks": [1]},
        {"tables": ["t_0", "t_1"], "keep_together": True},
    ]
    message = refusal(make_job(), make_cluster(), constraints=constraints)
    assert message == "sharding.constraints[2].keep_together: its tables have no allowed rank in common"


def test_a_table_cannot_be_kept_in_two_groups():
    constraints = [{"tables": ["t_0", "t_1"], "keep_together": True}, {"tables": ["t_1", "t_2"], "keep_together": True}]
    message = refusal(make_job(), make_cluster(), constraints=constraints)
    assert "table t_1 is kept together with others by sharding.constraints[0] already; merge" in message


def job_with(**changes):
    return dataclasses.replace(make_job(), **changes)


def test_int8_keeps_to_types_without_partial_sums():
    job = dataclasses.replace(make_job(dim=96), communication=CommunicationConfig(forward="int8"))
    cluster = make_cluster(num_nodes=2, ranks_per_node=2)
    types = {
        option.sharding_type for item in resolve_constraints(config_of(), job, cluster) for (option,) in item.choices
    }
    assert types.isdisjoint({"row_wise", "table_row_wise", "grid_shard"})
    message = refusal(job, cluster, types=["row_wise"])
    assert message.startswith("sharding: table t_0 may only be row_wise, but sharding.communication is int8")


def test_int8_packs_32_columns():
    communication = CommunicationConfig(backward="int8")
    message = refusal(dataclasses.replace(make_job(dim=48), communication=communication), make_cluster())
    assert "packs 32 columns together, but table t_0 has 48; make model.embedding_dim a multiple of 32" in message
    job = dataclasses.replace(make_job(dim=96), communication=communication)
    items = resolve_constraints(config_of(types=["column_wise"]), job, make_cluster())
    assert [option.num_column_shards for (option,) in items[0].choices] == [3]


def test_bf16_is_not_sent_over_gloo():
    job = job_with(communication=CommunicationConfig(backward="bf16"))
    message = refusal(job, make_cluster(hardware="cpu_host", ranks_per_node=2))
    assert message.startswith("sharding.communication.backward = 'bf16': gloo cannot send it")


def test_data_parallel_is_refused_where_it_would_train_otherwise():
    message = refusal(job_with(sparse_optimizer="adam"), make_cluster(), types=["data_parallel"])
    assert "optimizer.sparse.name = 'adam' updates only the rows looked up" in message
    message = refusal(make_job(), make_cluster(num_groups=2), types=["data_parallel"])
    assert "sharding.replicas has groups, which average only sharded tables; allow table_wise" in message
    message = refusal(job_with(sparse_weight_decay=0.1), make_cluster(), types=["data_parallel"])
    assert "optimizer.sparse.weight_decay would reach rows of a replica" in message
    half = tuple(dataclasses.replace(table, precision="fp16") for table in make_job().tables)
    message = refusal(job_with(tables=half), make_cluster(), types=["data_parallel"])
    assert "model.table_precision is fp16, in which a replica would keep its gradient" in message


def test_a_cache_is_refused_in_groups():
    message = refusal(make_job(), make_cluster(num_groups=2), kernels=["fused_uvm_caching"])
    assert message.startswith("table t_0: sharding.replicas has groups, which do not average tables behind a cache")


COLUMN_TYPES = {"column_wise", "table_column_wise", "grid_shard"}


def choices_of(optimizer, **settings):
    job, cluster = make_job(dim=64, optimizer=optimizer), make_cluster(num_nodes=2, ranks_per_node=2)
    items = resolve_constraints(config_of(**settings), job, cluster)
    return [{option.sharding_type for (option,) in item.choices} for item in items]


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "partial_rowwise_adam"])
def test_columns_of_tables_with_state_a_row_are_cut_only_where_a_constraint_says_so(optimizer):
    types = ["table_wise", "row_wise", *COLUMN_TYPES]
    assert all(found == {"table_wise", "row_wise"} for found in choices_of(optimizer, types=types))
    assert all(found > COLUMN_TYPES for found in choices_of("adagrad", types=types))
    first, *others = choices_of(optimizer, constraints=[{"tables": ["t_0"], "types": ["table_wise", "column_wise"]}])
    assert first == {"table_wise", "column_wise"}
    assert all(found.isdisjoint(COLUMN_TYPES) for found in others)
    assert choices_of(optimizer, types=["column_wise"]) == [{"column_wise"}] * 3, (
        "all types cut columns: it is asked for"
    )


def test_a_job_that_cuts_columns_of_tables_with_state_a_row_says_so():
    settings = {"types": ["column_wise"], "constraints": [{"tables": ["t_0"], "types": ["table_wise"]}]}

    def opening(optimizer):
        job, config = make_job(dim=64, optimizer=optimizer), config_of(**settings)
        return describe_placement(make_plan(job, make_cluster(), config, recipe="r", papilio_version="0"))

    assert "warning: t_1, t_2: cut by columns, as the recipe or plan asks, and rowwise_adagrad keeps" in opening(
        "rowwise_adagrad"
    )
    assert "warning" not in opening("adagrad")


def test_a_min_partition_that_cuts_nothing_is_refused():
    job = make_job(dim=32, optimizer="sgd")
    message = refusal(job, make_cluster(), types=["column_wise"], min_partition=33)
    assert message == (
        "sharding: table t_0 may only be column_wise, but min_partition = 33 leaves its 32 columns in one piece; set "
        "min_partition to 16 or less, or allow table_wise"
    )
    constraint = {"tables": ["t_1"], "types": ["column_wise"], "min_partition": 17}
    assert refusal(job, make_cluster(), constraints=[constraint]).startswith("sharding.constraints[0]: table t_1 may")
    resolve_constraints(config_of(types=["column_wise"], min_partition=33), job, make_cluster(ranks_per_node=1))


def test_a_single_row_is_not_cut_into_a_grid():
    job, cluster = make_job((1, 2), dim=64, optimizer="sgd"), make_cluster(num_nodes=2)
    message = refusal(job, cluster, types=["grid_shard"])
    assert message == "sharding: table t_0 may only be grid_shard, but it has a single row; allow table_wise"


@pytest.mark.parametrize("name", ["t_a[0]", "t_a*", "t_?"])
def test_a_table_is_found_by_its_name_whatever_brackets_it_has(name):
    job = make_job()
    tables = (dataclasses.replace(job.tables[0], name=name), *job.tables[1:])
    constraint = {"tables": [name], "types": ["row_wise"]}
    items = resolve_constraints(
        config_of(constraints=[constraint]), dataclasses.replace(job, tables=tables), make_cluster()
    )
    assert {option.sharding_type for (option,) in items[0].choices} == {"row_wise"}
