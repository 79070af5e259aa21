"""A plan on a terminal: figures that are right, lines that fit, and many tables and ranks that stay readable."""

import pytest

from papilio.sharding.reports.figures import bar, count, milliseconds, percent, rank_ranges, size, step_parts
from papilio.sharding.reports.text import format_plan
from tests.support.plan_files import hand_made, real_plan, table

ALL_TYPES = ["data_parallel", "table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard"]


def line_with(text, words):
    (line,) = [line for line in text.splitlines() if words in line]
    return " ".join(line.split())


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1_536, "1.50 KiB"), (3 << 20, "3.00 MiB"), (80 << 30, "80.0 GiB"), (-(5 << 29), "-2.50 GiB")],
)
def test_sizes(num_bytes, text):
    assert size(num_bytes) == text


def test_counts_and_times():
    assert [count(n) for n in (5, 950, 27.5, 39_062, 40_000_002)] == ["5", "950", "27.5", "39.1k", "40.0M"]
    assert [milliseconds(s) for s in (1.5, 0.0118, 0.00002)] == ["1,500.00", "11.80", "0.020"]


def test_shares():
    assert [percent(share) for share in (0.0, 0.004, -0.001, 0.126, -0.04, 1.0)] == [
        "0%",
        "<1%",
        "<1%",
        "13%",
        "-4%",
        "100%",
    ]


def test_ranks_are_written_as_ranges():
    assert rank_ranges([12, 0, 1, 2, 3, 3]) == "0-3,12"
    assert rank_ranges(range(0, 100, 2), max_length=16) == "50 in 0-98"


def test_a_bar_is_as_long_as_its_share():
    assert bar(0.5, 4) == "██  "
    assert bar(0.3125, 4, "·") == "█▎··"
    assert bar(7.0, 4) == "████"
    assert bar(1e-9, 4) == "▏   ", "something is never drawn as nothing"


def test_the_parts_add_up_to_the_step():
    plan = real_plan(8, 2, 4)
    assert sum(part.seconds for part in step_parts(plan)) == pytest.approx(plan.step.total_s)


def test_the_head_the_tables_and_the_ranks_say_what_the_plan_says():
    plan = hand_made(
        table("t_big", 0, 1, 2, 3, rows=4_000_000, dim=64, ms=0.25, pooling_factor=27.5),
        table("t_small", 2, ms=0.75),
        gib=(1, 1, 35, 1),
        notes=("mind the gap",),
    )
    text = format_plan(plan, 80, show_all=False)
    assert text.startswith("by_hand on some_machine, 4 ranks\n")
    assert "Step  4.00 ms, 1.02M samples/s" in text
    assert line_with(text, "overhead").endswith("3.00 ms 75%")
    assert line_with(text, "t_big") == "t_big 4.00M 64 27.5 row_wise all 977 MiB 0.25"
    assert line_with(text, "t_small") == "t_small 1.00k 8 1 table_wise 2 31.2 KiB 0.75"
    assert text.index("t_small") < text.index("t_big"), "the dearest first"
    assert "memory: max 35.0 GiB (rank 2), mean 9.50 GiB, max/mean 3.68" in text
    assert "embedding time: max 1.00 ms (rank 0), mean 1.00 ms, max/mean 1.00" in text
    (drawn,) = [line for line in text.splitlines() if "35.0 GiB " in line and "·" in line]
    assert drawn.split()[0] == "2"
    assert drawn.count("█") + drawn.count("▉") > 20, "of a bar of 21: 35/80 of memory and all of the time"
    assert line_with(text, " 0-1,3 ").startswith("0-1,3 1 ")
    assert text.endswith("Notes\n- mind the gap")


def test_a_kernel_that_is_not_fused_is_marked_and_explained():
    cached = table("t_cached", 0, compute_kernel="fused_uvm_caching", cache_load_factor=0.2)
    text = format_plan(hand_made(cached, table("t_plain", 1)), 80, show_all=False)
    assert "table_wise²" in line_with(text, "t_cached")
    assert "table_wise²" not in line_with(text, "t_plain")
    assert "² fused_uvm_caching: 1 table, 0.2 of the rows cached on the device" in text


@pytest.mark.parametrize(("num_tables", "num_nodes", "per_node"), [(1, 1, 1), (26, 2, 4), (120, 8, 8)])
@pytest.mark.parametrize("show_all", [False, True])
def test_no_line_is_wider_than_the_terminal(num_tables, num_nodes, per_node, show_all):
    plan = real_plan(num_tables, num_nodes, per_node, types=ALL_TYPES)
    for width in (80, 132):
        assert max(map(len, format_plan(plan, width, show_all=show_all).splitlines())) <= width


def test_500_tables_and_512_ranks_share_lines():
    tables = [table(f"t_{i}", i, rows=1_000 + i, ms=1 / (1 + i)) for i in range(500)]
    plan = hand_made(*tables, num_ranks=512, gib=[1 + i / 512 for i in range(512)])
    text = format_plan(plan, 80, show_all=False)
    assert len(text.splitlines()) < 80
    assert "t_0 " in text, "the dearest table by itself"
    assert "t_12 +487" in text
    assert "--all lists them" in text
    everything = format_plan(plan, 80, show_all=True)
    assert all(f"  t_{i} " in everything for i in range(500))
    listed = [line.split()[0] for line in everything[everything.rindex("  ranks ") :].splitlines()[1:]]
    assert listed == [str(rank) for rank in range(512)]


def test_long_names_are_cut_in_their_middle():
    name = "t_" + "very_" * 20 + "long"
    text = format_plan(hand_made(table(name, 0)), 80, show_all=False)
    assert "t_very_" in text
    assert "…" in text
    assert max(map(len, text.splitlines())) <= 80


def test_groups_are_told():
    plan = real_plan(4, 2, 2, num_groups=2)
    text = format_plan(plan, 80, show_all=False)
    assert "4 ranks (2 nodes of 2), 2 groups of 2" in text
    assert "of the first of 2 groups, which are alike" in " ".join(text.split())
