import subprocess
import sys
from pathlib import Path

import pytest

from papilio.launch import cli
from papilio.sharding.config import ShardingConfig
from papilio.sharding.hardware import load_hardware
from papilio.sharding.planner.job import Cluster
from papilio.trainer.calibration.shapes import calibration_steps
from papilio.trainer.calibration.synthetic import Shape, SyntheticTraining, plan_shape
from papilio.trainer.process_group import Ranks
from tests.support.rank_pool import RankPool

REPOSITORY = Path(__file__).resolve().parents[3]
SMALL = Shape((50, 70, 90), (1, 2, 3), dim=8, bottom=(8,), top=(8,), global_batch_size=64)


def test_calibrating_writes_a_profile_that_plans_can_use(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    command = [
        sys.executable,
        "-m",
        "papilio.launch.cli",
        "calibrate",
        "--output",
        str(path),
        "--quick",
        "--ranks",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s): whole steps of" in done.stdout
    assert "2 rank(s) busy, " in done.stdout
    hardware = load_hardware(str(path))
    assert hardware.device == "cpu"
    rates = hardware.rates_of(2)
    assert 1e7 < rates.all_to_all_bytes_per_s < 1e12
    assert 1e8 < rates.memory_bytes_per_s < 1e12
    assert 50e6 < hardware.framework_memory.si < 4e9
    planned = plan_shape(SMALL, ShardingConfig(), Cluster(hardware, 1, 2))
    assert planned is not None
    assert 1e-4 < planned.plan.step.total_s < 1


def test_the_name_of_a_profile_ends_in_toml(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", "--output", "machine.json"]) == 2
    assert "--output machine.json: the name of a hardware profile ends in .toml" in capsys.readouterr().err


def test_no_ranks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", "--output", "machine.toml", "--ranks", "0"]) == 2
    assert "--ranks 0: at least one rank is needed" in capsys.readouterr().err


def train(ranks: Ranks, types: tuple[str, ...]) -> float:
    kernels = ("dense",) if types == ("data_parallel",) else ("fused",)
    config = ShardingConfig.model_validate({"types": types, "kernels": kernels, "min_partition": 4})
    cluster = Cluster(load_hardware("dgx_a100").model_copy(update={"device": "cpu"}), 1, ranks.world_size)
    planned = plan_shape(SMALL, config, cluster)
    assert planned is not None
    assert {option.sharding_type for option, _ in planned.chosen} == set(types)
    training = SyntheticTraining(SMALL, planned.plan, ranks)
    seconds = training.run(3)
    training.close()
    return seconds


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"])
def test_synthetic_models_train_under_each_type(two_ranks: RankPool, kind: str) -> None:
    assert all(seconds > 0 for seconds in two_ranks.run(train, (kind,)))


def test_calibration_models_are_few_and_differ() -> None:
    for num_ranks in (1, 2, 4):
        steps = calibration_steps(num_ranks, is_quick=False)
        assert len(steps) == len({(step.shape, step.sharding.model_dump_json()) for step in steps}) <= 30
        assert len(calibration_steps(num_ranks, is_quick=True)) < 6
