import os
import subprocess
import sys

import pytest

from papilio.trainer.process_group import cores_of_rank


@pytest.mark.parametrize(
    ("cores", "world_size", "expected"),
    [
        ([0, 1], 2, [[0], [1]]),
        ([0, 1, 2, 3, 6], 2, [[0, 1], [2, 3, 6]]),
        ([4, 5, 7], 1, [[4, 5, 7]]),
        ([3], 2, [[], []]),
    ],
)
def test_ranks_share_the_cores(cores, world_size, expected):
    assert [cores_of_rank(cores, rank, world_size) for rank in range(world_size)] == expected


def test_a_process_without_torchrun_is_a_job_of_one_on_all_cores():
    code = (
        "import os\nbefore = os.sched_getaffinity(0)\nfrom papilio.trainer.process_group import process_group\n"
        "with process_group() as ranks:\n"
        "    print(ranks.rank, ranks.world_size, ranks.agree_on('x'), ranks.slice_of(7))\n"
        "    print(os.sched_getaffinity(0) == before)"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in {"MASTER_ADDR", "RANK", "WORLD_SIZE"}
    }
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.split() == ["0", "1", "x", "7", "True"]


def test_a_rank_stays_on_its_own_cores():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core only")
    code = (
        "import os, torch, threading\nfrom papilio.trainer.process_group import pin_to_cores\n"
        "pin_to_cores(1, 2)\nfound = []\n"
        "thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))\n"
        "thread.start()\nthread.join()\n"
        "print(sorted(found[0]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    cores = sorted(os.sched_getaffinity(0))
    assert result.stdout.strip() == str(cores[len(cores) // 2 :])
