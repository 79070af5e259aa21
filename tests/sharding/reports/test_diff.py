"""What moved between two plans: bytes counted by hand, sentences read back."""

import pytest

from papilio.sharding.plan_file import ShardPlace
from papilio.sharding.reports.diff import diff_plans, format_diff
from papilio.sharding.reports.moves import bytes_on_ranks, moved_bytes
from tests.support.plan_files import hand_made, real_plan, table

MIB = 1 << 20


def told(old, new, width=100):
    return format_diff(diff_plans(old, new), width)


def words(text):
    return " ".join(text.split())


def test_the_same_plans_are_the_same():
    plan = real_plan(8, 2, 2)
    assert told(plan, plan) == "the plans are the same"
    assert told(plan, plan.model_copy(update={"papilio_version": "9"})) == "the plans are the same"


def test_bytes_on_ranks():
    assert bytes_on_ranks(table("t", 0, 3, rows=1_000, dim=8)) == {0: 16_000, 3: 16_000}
    assert bytes_on_ranks(table("t", 0, 1, kind="data_parallel", rows=1_000, dim=8)) == {0: 32_000, 1: 32_000}
    assert bytes_on_ranks(table("t", 2, rows=1_000, dim=8, optimizer_bytes=4_000)) == {2: 36_000}


@pytest.mark.parametrize(
    ("old", "new", "num_bytes"),
    [
        (table("t", 0), table("t", 0), 0),
        (table("t", 0), table("t", 1), 32_000),
        (table("t", 0), table("t", 0, 1), 16_000),
        (table("t", 0, 1), table("t", 1), 16_000),
        (table("t", 0, 1), table("t", 1, 0), 32_000),
        (table("t", 0, 1), table("t", 0, 1, 2, 3), 24_000),
        (table("t", 0), table("t", 0, 1, 2, kind="data_parallel"), 64_000),
        (table("t", 0, 1, 2, kind="data_parallel"), table("t", 2), 0),
    ],
)
def test_moved_bytes(old, new, num_bytes):
    assert moved_bytes(old, new) == num_bytes


def test_bytes_that_stay_where_rows_and_columns_cross():
    """Rank 0 held the upper half of the rows and gets the left half of the columns: a quarter of the table stays."""
    columns = tuple(ShardPlace(row=0, column=4 * i, num_rows=1_000, num_columns=4, rank=i) for i in range(2))
    new = table("t", 0, 1, kind="column_wise", shards=columns)
    assert moved_bytes(table("t", 0, 1), new) == 16_000


def test_a_table_that_moved_is_told_with_its_cost():
    old = hand_made(table("t_user_id", 3, rows=16 * MIB, dim=16, ms=1.0), table("t_other", 0), gib=(1, 1, 1, 2))
    new = hand_made(
        table("t_user_id", 0, 1, 2, 3, rows=16 * MIB, dim=16, ms=2.2),
        table("t_other", 0),
        lookup_ms=2.2,
        gib=[1.25] * 4,
    )
    text = words(told(old, new))
    assert (
        "t_user_id: table_wise on rank 3 -> row_wise over all 4 ranks: +1.20 ms, +256 MiB on each of ranks 0-2, "
        "-768 MiB on rank 3" in text
    )
    assert "Step 4.00 -> 5.20 ms (+1.20 ms, +30.0%); 1.02M -> 788k samples/s" in text
    assert "lookup 1.00 -> 2.20 +1.20 ms" in text
    assert "overhead" not in text, "it did not change"
    assert "Memory at the peak 2.00 GiB on rank 3 -> 1.25 GiB on rank 0; usable 70.0 GiB" in text
    assert "most changed: +256 MiB on ranks 0-2; -768 MiB on rank 3" in text
    assert "768 MiB of tables and optimizer state change rank" in text
    assert "t_other" not in text


def test_tables_added_removed_resized_and_used_otherwise():
    old = hand_made(table("t_gone", 1), table("t_grows", 0), table("t_kernel", 2), table("t_pools", 3))
    new = hand_made(
        table("t_new", 1, rows=2_000),
        table("t_grows", 0, rows=9_000),
        table("t_kernel", 2, compute_kernel="fused_uvm"),
        table("t_pools", 3, pooling_factor=20.0),
    )
    text = words(told(old, new))
    assert "Tables 3 changed, 1 added, 1 removed" in text
    assert "+ t_new: 2.00k rows x 8, 62.5 KiB, table_wise on rank 1, 1.00 ms" in text
    assert "- t_gone: 1.00k rows x 8, 31.2 KiB, table_wise on rank 1, 1.00 ms" in text
    assert "t_grows: rows 1,000 -> 9,000" in text
    assert "t_kernel: table_wise on rank 2 -> table_wise fused_uvm on rank 2" in text
    assert "t_pools: ids a sample 1 -> 20" in text
    assert diff_plans(old, new).moved_bytes == 0


def test_a_table_that_keeps_its_type_moves_between_ranks():
    text = words(told(hand_made(table("t", 0)), hand_made(table("t", 2))))
    assert "t: table_wise on rank 0 -> on rank 2" in text


def test_a_table_cut_otherwise_on_the_same_ranks():
    old, new = hand_made(table("t", 0, 1)), hand_made(table("t", 1, 0))
    assert "t: row_wise on ranks 0-1, cut otherwise" in words(told(old, new))


def test_the_job_is_told():
    old = hand_made(table("t", 0))
    machine = old.machine.model_copy(update={"hardware": "other", "num_nodes": 2, "usable_memory_bytes": 60 << 30})
    changes = {"machine": machine, "global_batch_size": 8_192, "sparse_optimizer": "adagrad", "precision": "bf16"}
    text = words(told(old, old.model_copy(update=changes)))
    for sentence in (
        "hardware: some_machine -> other",
        "ranks: 4 (1 x 4) -> 8 (2 x 4)",
        "usable of it: 70.0 GiB -> 60.0 GiB",
        "global batch: 4,096 -> 8,192",
        "sparse optimizer: sgd -> adagrad",
        "precision of the dense part: fp32 -> bf16",
        "Tables all placed as before",
    ):
        assert sentence in text


def test_500_changed_tables_are_summed_up():
    old = hand_made(*(table(f"t_{i}", i % 64, rows=64_000) for i in range(500)), num_ranks=64)
    new = hand_made(
        *(table(f"t_{i}", *range(64), rows=64_000, ms=1 + i / 1_000) for i in range(300)),
        *(table(f"t_{i}", (i + 1) % 64, rows=64_000) for i in range(300, 500)),
        num_ranks=64,
    )
    text = told(old, new, 80)
    assert "Tables  500 changed" in text
    assert len(text.splitlines()) < 50
    assert max(map(len, text.splitlines())) <= 80
    assert "t_299: table_wise on rank 43 -> row_wise over all 64 ranks: +0.30 ms" in words(text)
    assert "and 288 more: table_wise -> row_wise: 0.000" not in text
    assert "more: table_wise -> row_wise: +0.000 ms to +0.29 ms each" in words(text)
    assert "and 196 more: table_wise, on other ranks" in words(text)
    per_table = 64_000 * 8 * 4
    assert diff_plans(old, new).moved_bytes == 300 * per_table * 63 // 64 + 200 * per_table


def test_moved_bytes_and_memory_of_real_plans_agree():
    """Between plans of one job, what the tables gain and lose on a rank is what its weights and state gain and lose."""
    old, new = real_plan(12, 1, 4, types=["table_wise"]), real_plan(12, 1, 4, types=["row_wise"])
    diff = diff_plans(old, new)
    for before, after in zip(old.ranks, new.ranks, strict=True):
        held = [plan.memory.weights_bytes + plan.memory.optimizer_bytes for plan in (before, after)]
        gained = sum(change.rank_bytes.get(before.rank, 0) for change in diff.changed)
        # Rows that do not divide are padded in memory, so a shard may be a row short of its share.
        assert abs(gained - (held[1] - held[0])) <= 12 * 4 * (32 * 4 + 4)


def test_no_line_is_wider_than_the_terminal():
    old = real_plan(12, 1, 4, types=["table_wise"])
    new = real_plan(12, 2, 2, types=["row_wise", "data_parallel"])
    small = new.machine.model_copy(update={"usable_memory_bytes": 123 << 30})
    text = told(old, new.model_copy(update={"machine": small}), 80)
    assert "-> 123 GiB" in words(text)
    assert max(map(len, text.splitlines())) <= 80


def test_bytes_that_move_are_those_of_the_first_group():
    old, new = (hand_made(table("t", rank)) for rank in (0, 1))
    assert "state change rank in the first group" not in words(told(old, new))
    grouped = [
        plan.model_copy(update={"machine": plan.machine.model_copy(update={"num_groups": 2})}) for plan in (old, new)
    ]
    assert "31.2 KiB of tables and optimizer state change rank in the first group of ranks" in words(told(*grouped))


def test_many_tables_that_only_move_are_as_fast_as_before():
    old, new = (hand_made(*(table(f"t_{i}", (i + turn) % 4) for i in range(40))) for turn in (0, 1))
    assert "and 28 more: table_wise, on other ranks: as fast as before" in words(told(old, new))
