"""Slurm with its accounting database, which remembers jobs that slurmctld has forgotten: pytest -m accounting."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torchx import specs
from torchx.runner import Runner
from torchx.schedulers.slurm_scheduler import create_scheduler

from papilio.launch import cli
from papilio.launch.schedulers.job_folder import find_record, host_logs
from papilio.launch.schedulers.runner import make_runner
from tests.support.slurm_cluster import SlurmCluster
from tests.support.slurm_programs import NoSlurmError, find_slurm
from tests.support.torchx_command import run_torchx

pytestmark = pytest.mark.accounting
FORGET_TIMEOUT_S = 180


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    try:
        programs = find_slurm(with_accounting=True)
    except NoSlurmError as error:
        pytest.skip(str(error))
    with (
        SlurmCluster(programs, num_hosts=2, job_age_s=2, with_accounting=True) as cluster,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.chdir(tmp_path_factory.mktemp("submitted_from"))
        yield cluster


def make_app(script: str) -> specs.AppDef:
    resource = specs.Resource(cpu=1, gpu=0, memMB=100)
    role = specs.Role("small", "", entrypoint="bash", args=["-c", script], num_replicas=2, resource=resource)
    return specs.AppDef("small", roles=[role])


@pytest.fixture(scope="module")
def jobs(cluster: SlurmCluster) -> dict[str, str]:
    """Handles of jobs that slurmctld has forgotten, by how they ended."""
    with make_runner() as runner, Runner("torchx", {"slurm": create_scheduler}) as torchx:
        handles = {
            "SUCCEEDED": runner.run(make_app("true"), "slurm"),
            "FAILED": runner.run(make_app("exit 4"), "slurm"),
            "CANCELLED": runner.run(make_app("sleep 100"), "slurm"),
            "TORCHX": torchx.run(make_app("true"), "slurm"),
        }
        deadline_s = time.monotonic() + FORGET_TIMEOUT_S
        record = find_record("slurm", Path(handles["CANCELLED"]).name)
        assert record is not None
        while not host_logs(record.folder):
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
        runner.cancel(handles["CANCELLED"])
    while subprocess.run(["squeue", "-h", "-t", "all"], capture_output=True, text=True, check=True).stdout.strip():
        assert time.monotonic() < deadline_s, "slurmctld remembers jobs for longer than it was told"
        time.sleep(1)
    return handles


def told_of(handle: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    code = cli.main(["status", handle, "--json"])
    told: dict[str, object] = json.loads(capsys.readouterr().out)
    assert code == {"SUCCEEDED": 0, "FAILED": 1, "CANCELLED": 4}[str(told["state"])]
    return told


@pytest.mark.parametrize("state", ["SUCCEEDED", "FAILED", "CANCELLED"])
def test_status_comes_from_the_database(jobs: dict[str, str], state: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = told_of(jobs[state], capsys)
    assert told["state"] == state
    assert "forgotten" not in str(told["message"])
    assert told["exit_status"] == {"SUCCEEDED": 0, "FAILED": 4, "CANCELLED": 143}[state]


def test_a_job_of_torchxs_own_scheduler_is_known_by_its_components(
    jobs: dict[str, str], cluster: SlurmCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    told = told_of(jobs["TORCHX"], capsys)
    assert told["state"] == "SUCCEEDED"
    assert sorted(host["name"] for host in told["hosts"]) == cluster.hosts  # type: ignore[attr-defined]
    done = run_torchx("status", "--json", jobs["TORCHX"])
    assert json.loads(done.stdout)["state"] == "SUCCEEDED", done.stderr
    assert f"{jobs['TORCHX']} " in run_torchx("list", "-s", "slurm").stdout


def test_list_has_all_of_them(jobs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "-s", "slurm", "--json"]) == 0
    rows = {row["job"].rpartition("/")[2]: row["state"] for row in json.loads(capsys.readouterr().out)}
    expected = {Path(handle).name: state for state, handle in jobs.items()}
    assert rows == {job_id: "SUCCEEDED" if state == "TORCHX" else state for job_id, state in expected.items()}
