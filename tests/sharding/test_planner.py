import copy
import json

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from sharding.config import ShardingConfig
from sharding.plan_file import describe_placement, plan_to_dict, plan_to_json
from sharding.planner import PlanError, check_plan, make_plan


def make_tables(rows=(100, 60)):
    return EmbeddingBagCollection(
        [
            EmbeddingBagConfig(name=f"t_{i}", feature_names=[f"f_{i}"], num_embeddings=n, embedding_dim=16)
            for i, n in enumerate(rows)
        ],
        device=torch.device("meta"),
    )


def plan_tables(ranks, config, rows=(100, 60)):
    return make_plan(
        torch.nn.ModuleDict({"tables": make_tables(rows)}),
        config,
        device=ranks.device,
        local_world_size=ranks.local_world_size,
        local_batch_size=4,
        group=ranks.group,
    )


def plan_as_dict(ranks, config):
    return plan_to_dict(plan_tables(ranks, config), ranks.world_size)


def error_of(ranks, config, rows=(100, 60)):
    try:
        plan_tables(ranks, config, rows)
    except PlanError as error:
        return str(error)
    return None


def test_every_rank_gets_the_same_plan_with_every_row_placed_once(two_ranks):
    config = ShardingConfig(types=("table_wise",), table_types={"t_0": "row_wise"})
    first, second = two_ranks.run(plan_as_dict, config)
    assert first == second
    tables = first["modules"]["tables"]
    assert tables["t_0"]["sharding_type"] == "row_wise"
    assert [(s["row"], s["num_rows"], s["rank"]) for s in tables["t_0"]["shards"]] == [(0, 50, 0), (50, 50, 1)]
    assert tables["t_1"]["sharding_type"] == "table_wise"
    assert [(s["num_rows"], s["num_columns"]) for s in tables["t_1"]["shards"]] == [(60, 16)]
    assert {table["compute_kernel"] for table in tables.values()} == {"fused"}


def test_an_unknown_table_is_named_with_the_nearest(one_rank):
    config = ShardingConfig(table_types={"t_O": "row_wise"})
    assert "sharding.table_types.t_O: there is no such table; did you mean t_" in one_rank.run(error_of, config)[0]


def test_tables_that_do_not_fit_say_what_they_need_and_what_helps(one_rank):
    config = ShardingConfig(memory_per_rank_gib=0.001, reserve_fraction=0.2)
    message = one_rank.run(error_of, config, (1_000_000,))[0]
    assert "the tables do not fit: 0.06 GiB of weights over 1 rank(s)" in message
    assert "the largest table, t_0, needs 0.06 GiB" in message
    assert "lower sharding.reserve_fraction" in message


def checked_plans(ranks):
    """Messages of check_plan on a plan with a table left out, and one with a shard cut short."""
    plan = plan_tables(ranks, ShardingConfig(types=("table_wise",)))
    tables = {table.name: table for table in make_tables().embedding_bag_configs()}
    without, short = copy.deepcopy(plan), copy.deepcopy(plan)
    del without.plan["tables"]["t_1"]
    short.plan["tables"]["t_0"].sharding_spec.shards[0].shard_sizes = [99, 16]
    messages = []
    for changed in (without, short):
        with pytest.raises(PlanError) as error:
            check_plan(changed, tables)
        messages.append(str(error.value))
    return messages


def test_a_table_left_out_or_cut_short_is_refused(one_rank):
    without, short = one_rank.run(checked_plans)[0]
    assert "places table t_1 0 times" in without
    assert "the plan covers 1584 of the weights of table t_0" in short


def described(ranks):
    plan = plan_tables(ranks, ShardingConfig(types=("table_wise",), table_types={"t_0": "row_wise"}))
    return json.loads(plan_to_json(plan, 2)), describe_placement(plan, 2)


def test_the_plan_file_says_its_version_and_world(two_ranks):
    plan, lines = two_ranks.run(described)[0]
    assert (plan["format_version"], plan["world_size"]) == (1, 2)
    assert sum(int(line.split(": ")[1].split()[0]) for line in lines.splitlines()) == 3, "shards over both ranks"
