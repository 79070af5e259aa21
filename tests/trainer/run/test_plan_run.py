"""`papilio plan` from end to end: recipes planned for machines that are not here, in this process, on meta."""

import json

import pytest

from papilio.sharding.plan_file import read_plan_file
from papilio.trainer.config_file import load_config
from papilio.trainer.run.plan_options import PlanOptions
from papilio.trainer.run.plan_run import main, prepare_planning

TERABYTE = PlanOptions(recipe="criteo_terabyte_dcnv2", hardware="dgx_a100", num_nodes=16)
TERABYTE_ON_ONE = PlanOptions(recipe="criteo_terabyte_dcnv2", hardware="dgx_a100")


def plan_main(options: PlanOptions, **changes: object) -> int:
    return main([options.model_copy(update=changes).to_argument()])


def test_terabyte_for_128_gpus(tmp_path, capsys):
    path, page = tmp_path / "plan.json", tmp_path / "plan.html"
    assert plan_main(TERABYTE, output=str(path), html=str(page)) == 0
    shown = capsys.readouterr().out
    plan = read_plan_file(str(path))
    assert (plan.machine.num_ranks, len(plan.ranks), len(plan.tables)) == (128, 128, 26)
    weights_bytes = 4 * 128 * sum(table.num_embeddings for table in plan.tables)
    assert sum(table.weights_bytes for table in plan.tables) == weights_bytes
    for table in plan.tables:
        assert sum(shard.num_rows * shard.num_columns for shard in table.shards) == 128 * table.num_embeddings
    held_bytes = [0] * 128  # by the shards alone, 4 bytes a weight
    for table in plan.tables:
        for shard in table.shards:
            held_bytes[shard.rank] += 4 * shard.num_rows * shard.num_columns
    # The last of 8 row shards may be smaller, by less than 8 rows of 512 bytes; memory is that of the largest.
    for rank, held in zip(plan.ranks, held_bytes, strict=True):
        assert 0 <= rank.memory.weights_bytes - held < 8 * 512 * rank.num_shards
    most_bytes = max(rank.memory.device_bytes for rank in plan.ranks)
    assert max(held_bytes) < most_bytes < plan.machine.usable_memory_bytes
    assert {rank.node for rank in plan.ranks} == set(range(16))
    assert "t_C1" in shown
    assert "dgx_a100" in shown
    assert "t_C26" in page.read_text("utf-8")


def test_json_for_machines(capsys):
    assert plan_main(TERABYTE, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["hardware"] == "dgx_a100"


def test_explaining_a_table(capsys):
    assert plan_main(TERABYTE, explain="t_C10") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(
        "t_C10: 40,000,002 rows x 128, 1 id(s) a sample, 19.07 GiB of weights; 128 rank(s) of dgx_a100"
    )
    assert "not allowed by the recipe" in shown


def test_the_dense_part_is_counted_from_the_model():
    # bottom 13-512-256-64-16, top (16 + 27 * 26 / 2 = 367)-512-256-1, with biases.
    planning = prepare_planning(load_config("quickstart"), "dgx_a100", 1, 2)
    dense = planning.job.dense
    assert dense.layers == ((13, 512), (512, 256), (256, 64), (64, 16), (367, 512), (512, 256), (256, 1))
    assert dense.num_parameters == sum(n * m + m for n, m in dense.layers)
    assert (dense.num_interacting, dense.interaction_dim) == (27, 16)


def test_cross_layers_are_counted():
    dense = prepare_planning(load_config("criteo_terabyte_dcnv2"), "dgx_a100", 16, None).job.dense
    width = 27 * 128
    assert dense.layers.count((width, 512)) == 3
    assert dense.layers.count((512, width)) == 3
    assert dense.num_interacting == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hardware": "dgx_a10"}, "hardware dgx_a10: no such profile or file; did you mean dgx_a100? profiles: "),
        ({"num_nodes": 0}, "at least one of each is needed"),
        ({"explain": "t_C27"}, "there is no such table; did you mean t_C"),
        ({"overrides": ("--data.shape=criteo_terabit",)}, "did you mean criteo_terabyte?"),
        (
            {"overrides": ("--data.shape=none",)},
            "so the sizes of the tables are not known; preprocess the data",
        ),
        (
            {"overrides": ("--sharding.replicas.num_groups=3",)},
            "does not divide 8 ranks; possible: 1, 2, 4, 8",
        ),
        (
            {"hardware": "big_basin_p100", "overrides": ("--sharding.types=['table_wise']",)},
            "It fits, each of these planned and checked, the fastest first:",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(changes, message, capsys):
    assert plan_main(TERABYTE_ON_ONE, **changes) == 1
    error = capsys.readouterr().err
    assert error.startswith("papilio plan: error: ")
    assert message in error
