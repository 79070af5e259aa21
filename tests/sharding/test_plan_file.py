"""Plan files: there and back exactly, and refused on another model, other ranks or another version."""

import json

import pytest
import torch
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets

from papilio.sharding.plan_conversion import check_plan, to_sharding_plan
from papilio.sharding.plan_file import PlanFileError, checksum_of, plan_from_json, read_plan_file
from papilio.sharding.planner.errors import PlanError
from papilio.sharding.planner.make import make_plan
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


def read(tree):
    """The plan in a tree that was edited on purpose: with the checksum that belongs to it."""
    return plan_from_json(json.dumps(tree | {"checksum": checksum_of(tree)}), "plan.json")


def changed(plan, **values):
    return read(json.loads(plan.to_json()) | values)


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
    [("{", "is damaged"), ("[]", "has format version None"), ('{"format_version": 3}', "has format version 3")],
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


@pytest.mark.parametrize(
    ("sharding_type", "rows"),
    [
        (name, rows)
        for name in TYPES
        if name != "data_parallel"
        for rows in (10, 3, 1)
        if (name, rows) != ("grid_shard", 1)
    ],
)
def test_tables_are_cut_as_torchrec_cuts_them(sharding_type, rows):
    cluster = make_cluster(num_nodes=2, ranks_per_node=2)
    plan = plan_of(make_job((rows,), dim=64, optimizer="sgd"), cluster, types=[sharding_type], min_partition=32)
    (table,) = plan.tables
    sizes, offsets = calculate_shard_sizes_and_offsets(
        torch.empty(rows, 64, device="meta"), 4, 2, sharding_type, col_wise_shard_dim=table.shards[0].num_columns
    )
    assert [[s.row, s.column] for s in table.shards] == [list(offset) for offset in offsets]
    assert [[s.num_rows, s.num_columns] for s in table.shards] == [list(size) for size in sizes]


def edited(plan, shards=None, **values):
    """The plan with a table of other values; `shards`: (row, column, rows, columns, rank) of each."""
    tree = json.loads(plan.to_json())
    if shards is not None:
        keys = ("row", "column", "num_rows", "num_columns", "rank")
        values |= {"shards": [dict(zip(keys, s, strict=True)) for s in shards], "ranks": [s[4] for s in shards]}
    tree["tables"][0] |= values
    return read(tree)


EDITS = [
    # A full cover of 50 rows, but TorchRec sends ids 10 to 24 to rank 0.
    ("row_wise", [(0, 0, 10, 16, 0), (10, 0, 40, 16, 1)], {},
     "is row_wise: shard 0 holds rows 0 to 9, columns 0 to 15 on rank 0, but training gives rank 0 rows 0 to 24"),
    ("row_wise", [(0, 0, 25, 16, 0), (24, 0, 25, 16, 1)], {}, "shard 1 holds rows 24 to 48"),
    ("row_wise", [(0, 0, 25, 16, 1), (25, 0, 25, 16, 0)], {}, "its shards lie on ranks 0 to 1 in order"),
    ("row_wise", [(0, 0, 50, 16, 0)], {}, "is row_wise in 1 shard(s), but needs 2"),
    ("table_wise", [(0, 0, 50, 16, 2)], {}, "is table_wise on rank 2, but tables are spread over ranks 0 to 1"),
    ("table_wise", [(0, 0, 50, 8, 0)], {}, "shard 0 holds rows 0 to 49, columns 0 to 7 on rank 0, but training gives"),
    ("table_wise", [(0, 0, 25, 16, 0), (25, 0, 25, 16, 1)], {}, "is table_wise in 2 shard(s), but needs 1"),
    ("table_wise", [], {}, "is table_wise in 0 shard(s), but needs 1"),
    ("column_wise", [(0, 0, 50, 4, 0), (0, 4, 50, 12, 1)], {}, "shard 0 holds rows 0 to 49, columns 0 to 3"),
    ("column_wise", [(0, 8, 50, 8, 0), (0, 0, 50, 8, 1)], {}, "shard 0 holds rows 0 to 49, columns 8 to 15"),
    ("column_wise", [(0, 0, 50, 8, 0), (0, 8, 50, 8, 0)], {}, "gives rank 0 more than one shard"),
    ("table_wise", None, {"compute_kernel": "dense"}, "with the kernel dense; on cpu it takes fused"),
    ("table_wise", None, {"compute_kernel": "fused_uvm"}, "with the kernel fused_uvm; on cpu it takes fused"),
    ("table_wise", None, {"cache_load_factor": 0.5}, "kernel fused and cache_load_factor 0.5; it needs none"),
    ("table_wise", None, {"ranks": [1, 0]}, "the ranks of table t_0 are not those of its shards"),
    ("table_wise", [], {"sharding_type": "data_parallel", "compute_kernel": "fused"}, "on cpu it takes dense"),
    ("table_wise", [(0, 0, 50, 16, 0)], {"sharding_type": "data_parallel", "compute_kernel": "dense"},
     "every rank holds the whole table"),
]  # fmt: skip


@pytest.mark.parametrize(("sharding_type", "shards", "values", "message"), EDITS)
def test_a_plan_that_training_would_not_follow_is_refused(sharding_type, shards, values, message):
    job = make_job((50,), optimizer="sgd")
    cluster = make_cluster(ranks_per_node=2, hardware="cpu_host")
    plan = plan_of(job, cluster, types=[sharding_type], min_partition=8)
    check_plan(plan, job, cluster, "plan.json")
    assert message in refusal(edited(plan, shards, **values), job, cluster)


HOST_EDITS = [
    ("table_row_wise", [(0, 0, 25, 64, 1), (25, 0, 25, 64, 2)],
     "the rows of a column block lie on all ranks of one host in order, not on 1, 2"),
    ("table_column_wise", [(0, 0, 50, 32, 1), (0, 32, 50, 32, 2)], "its shards lie on one host, not on several"),
    ("grid_shard", [(0, 0, 25, 32, 0), (25, 0, 25, 32, 2), (0, 32, 25, 32, 1), (25, 32, 25, 32, 3)],
     "the rows of a column block lie on all ranks of one host in order, not on 0, 2"),
    ("grid_shard", [(0, 0, 25, 64, 0)], "in 1 shard(s), but needs a multiple of 2"),
]  # fmt: skip


@pytest.mark.parametrize(("sharding_type", "shards", "message"), HOST_EDITS)
def test_a_plan_that_takes_other_hosts_than_training_is_refused(sharding_type, shards, message):
    job, cluster = make_job((50,), dim=64, optimizer="sgd"), make_cluster(num_nodes=2, ranks_per_node=2)
    plan = plan_of(job, cluster, types=[sharding_type], min_partition=32)
    check_plan(plan, job, cluster, "plan.json")
    assert message in refusal(edited(plan, shards), job, cluster)


def test_a_plan_for_another_optimizer_is_refused():
    """Of columns that are cut, only row-wise Adagrad's log has to warn, so the plan must know who trains."""
    job, cluster = make_job((50,), optimizer="sgd"), make_cluster(ranks_per_node=2, hardware="cpu_host")
    plan = plan_of(job, cluster, types=["column_wise"], min_partition=8)
    message = "plan.json was made for optimizer.sparse.name = sgd, this job trains with rowwise_adagrad; make the plan"
    assert message in refusal(plan, make_job((50,), optimizer="rowwise_adagrad"), cluster)
    assert "= a\\x1b[2J, this job" in refusal(changed(plan, sparse_optimizer="a\x1b[2J"), job, cluster)


@pytest.mark.parametrize("ranks", [[], [0], [1, 0], [0, 0], [0, 1, 2]])
def test_a_plan_that_does_not_list_the_ranks_is_refused(ranks):
    """The head of a job's log and its last lines are made of them."""
    cluster = make_cluster(ranks_per_node=2)
    plan = plan_of(cluster=cluster)
    listed = json.loads(plan.to_json())["ranks"]
    edited = changed(plan, ranks=[listed[0] | {"rank": rank} for rank in ranks])
    assert "plan.json does not list ranks 0 to 1, each once and in order" in refusal(edited, cluster=cluster)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("step", "total_s"), 0),
        (("step", "total_s"), 1e308),
        (("ranks", 0, "memory", "dense_bytes"), 10**400),
        (("ranks", 0, "memory", "host_bytes"), -1),
        (("machine", "usable_memory_bytes"), 10**400),
        (("machine", "num_nodes"), 10**400),
        (("tables", 0, "num_embeddings"), 10**400),
    ],
)
def test_a_figure_that_no_machine_has_is_refused_as_it_is_read(place, value):
    tree = json.loads(plan_of().to_json())
    inner = tree
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(
        PlanFileError, match=rf"damaged \({'.'.join(map(str, place))}: (Input should be|no step takes 0 s)"
    ):
        read(tree)


def test_an_edited_or_damaged_plan_is_refused_by_its_checksum():
    text = plan_of().to_json()
    assert plan_from_json(text.replace("\n", "\n\n"), "plan.json") == plan_of(), "white space is no content"
    for old, new in (('"num_embeddings": 1000', '"num_embeddings": 1001'), ('"recipe": "r"', '"recipe": "s"')):
        assert old in text
        with pytest.raises(
            PlanFileError, match=r"plan.json is not as it was written: its checksum is [0-9a-f]{16}, its"
        ):
            plan_from_json(text.replace(old, new, 1), "plan.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is damaged"),
        (b'{"a":' * 100_000, "is damaged"),
        (b'{"format_version": ' + b"1" * 5_000 + b"}", "is damaged"),
        (b'{"format_version": 4}', "its checksum is None"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, content, message):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanFileError, match=message):
        read_plan_file(str(path))


def test_a_folder_is_no_plan_file(tmp_path):
    with pytest.raises(PlanFileError, match=r"cannot be read \(Is a directory\); name a file of `papilio plan`"):
        read_plan_file(str(tmp_path))
