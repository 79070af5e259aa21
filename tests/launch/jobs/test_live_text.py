"""The merged view as text: what is said, and that it fits the terminal."""

import re

import pytest

from papilio.launch.jobs.live_text import Ink, table, view_lines
from papilio.trainer.elastic.health.live_view import AlertView, CheckpointView, LiveView, RankView

NOW = 1e9
FINDING = (
    "rank 3 (host n1) computes its dense layers 2.1 times as slowly as the others (21.0 ms against 10.0 ms), and "
    "everyone waits; look there for other processes, clocks, temperature"
)


def rank_of(rank, **settings):
    values = {"step": 1_240, "phase": "training", "lookup_ms": 4.0, "dense_ms": 10.0, "wait_share": 0.01}
    return RankView(rank=rank, host=f"n{rank // 2}", **{**values, **settings})


def view_of(ranks, **settings):
    values = {
        "unix_s": NOW - 1.4,
        "interval_s": 2.0,
        "name": "terabyte",
        "world_size": len(ranks),
        "step": 1_240,
        "num_steps": 4_960,
        "epoch": 1,
        "num_epochs": 2,
        "epoch_share": 0.5,
        "samples_per_s": 67_734.2,
        "step_ms": 50.0,
        "remaining_s": 186.0,
        "loss": 0.44761,
        "validation_auc": 0.80392,
        "checkpoint": CheckpointView(name="step_0000001200-a", step=1_200, unix_s=NOW - 72),
    }
    return LiveView(ranks=tuple(ranks), **{**values, **settings})


def lines_of(view, width=80):
    return view_lines(view, width, NOW, Ink(has_colors=False))


def test_a_small_job_has_a_line_for_each_rank():
    slow = AlertView(kind="dense", ranks=(3,), host="n1", text=FINDING)
    ranks = [rank_of(0), rank_of(1), rank_of(2, wait_share=0.034), rank_of(3, dense_ms=21.0, silent_s=1.2)]
    assert lines_of(view_of(ranks, findings=(slow,))) == [
        "terabyte  running  step 1,240 of 4,960  |████            |  25%  3 min 06 s left",
        "67,734 samples/s   50.0 ms a step   epoch 1 of 2 (50%)   logloss 0.4476 (train)",
        "AUC 0.8039 (validation)   data wait 1.6% (rank 2: 3.4%)",
        "saved step 1,200, 1 min 12 s ago",
        "",
        "   rank  host   step  phase     lookups    dense  data wait  sign",
        "      0  n0    1,240  training   4.0 ms  10.0 ms       1.0%   0 s",
        "      1  n0    1,240  training   4.0 ms  10.0 ms       1.0%   0 s",
        "      2  n1    1,240  training   4.0 ms  10.0 ms       3.4%   0 s",
        "!     3  n1    1,240  training   4.0 ms  21.0 ms       1.0%   1 s",
        "",
        "! rank 3 (host n1) computes its dense layers 2.1 times as slowly as the others",
        "  (21.0 ms against 10.0 ms), and everyone waits; look there for other processes,",
        "  clocks, temperature",
    ]


def test_a_rank_without_a_heartbeat_is_named_and_no_time_left_is_promised():
    lines = lines_of(view_of([rank_of(0), rank_of(1, silent_s=16.2), rank_of(2, silent_s=4.0)]))
    assert lines[0].startswith("terabyte  waiting  step 1,240 of 4,960")
    assert "left" not in lines[0]
    assert [line.split()[:2] for line in lines if line.startswith("!  ")] == [["!", "1"]]
    assert "! unresponsive: rank 1 (host n0) for 16 s; the others wait, so nothing can be" in lines
    many = " ".join(lines_of(view_of([rank_of(rank, silent_s=20.0 + rank) for rank in range(7)]), width=400))
    assert "unresponsive: rank 6 (host n3) for 26 s, rank 5" in many
    assert "rank 2 (host n1) for 22 s and 2 more; the others wait" in many
    ended = lines_of(view_of([rank_of(0, silent_s=16.0)], state="failed"))
    assert "unresponsive" not in " ".join(ended)


def test_a_wide_terminal_shows_each_ranks_step_timer():
    lines = lines_of(
        view_of([rank_of(0, dense_ms=8.0, wait_share=0.0), rank_of(1, dense_ms=20.0, wait_share=0.0)]), 120
    )
    assert lines[4].endswith("   own work of a step: lookups ▒, dense █, data wait ░")
    assert lines[5].endswith("   " + "▒" * 4 + "█" * 8), "12 ms of the longest's 24"
    assert lines[6].endswith("   " + "▒" * 4 + "█" * 20)


@pytest.mark.parametrize("width", [80, 120])
def test_of_many_ranks_the_hosts_and_the_slowest_are_shown(width):
    ranks = [rank_of(rank, dense_ms=10.0 + (rank == 300) + rank / 1e4) for rank in range(512)]
    lines = lines_of(view_of(ranks), width)
    assert len(lines) < 30
    assert max(map(len, lines)) <= width
    (host,) = [line for line in lines if line.strip().startswith("n150 ")]
    assert host.split() == ["n150", "300-301", "1,240", "4.0", "ms", "11.0", "ms", "1.0%", "0", "s"]
    assert "the longest of each host's ranks; 244 faster hosts are left out" in lines
    slowest = lines[lines.index("slowest by their own work") + 2 :]
    assert [line.split()[0] for line in slowest[:5]] == ["300", "511", "510", "509", "508"]


def test_an_old_view_says_so():
    lines = lines_of(view_of([rank_of(0)], unix_s=NOW - 200))
    assert lines[0].startswith("terabyte  old 3 min 20 s ago  step 1,240 of 4,960")
    assert "! this was written 3 min 20 s ago and should be anew every 2 s: rank 0 is gone," in lines


def test_a_job_that_ended_says_how_and_when():
    lines = lines_of(
        view_of([rank_of(0)], state="failed", error="rank 1 (host n0) failed first: KeyError", unix_s=NOW - 9)
    )
    assert lines[0].startswith("terabyte  failed 9 s ago  step ")
    assert "left" not in lines[0]
    assert "! rank 1 (host n0) failed first: KeyError" in lines
    assert "1 of 2 ranks gave no heartbeat yet" in lines_of(view_of([rank_of(0)], world_size=2))


def test_what_is_not_measured_yet_is_a_dash():
    view = view_of(
        [rank_of(0, lookup_ms=None, dense_ms=None, wait_share=None)], samples_per_s=None, step_ms=None, loss=None
    )
    view = view.model_copy(update={"checkpoint": None, "validation_auc": None, "remaining_s": None})
    lines = lines_of(view, 120)
    assert lines[1] == "epoch 1 of 2 (50%)   nothing saved yet"
    assert lines[4].split() == ["0", "n0", "1,240", "training", "-", "-", "-", "0", "s"]


def test_colors_change_no_letter():
    view = view_of([rank_of(0)], findings=(AlertView(kind="dense", ranks=(0,), host="n0", text=FINDING),))
    colored = view_lines(view, 80, NOW, Ink(has_colors=True))
    assert any("\x1b[33m" in line for line in colored)
    assert [re.sub("\x1b\\[\\d+m", "", line) for line in colored] == lines_of(view)


def test_columns_without_a_word_are_left_out():
    assert table([["", "a", "b"], ["", "1", "22"]], right={2}) == ["a   b", "1  22"]
