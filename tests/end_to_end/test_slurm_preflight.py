"""Preflights on a real Slurm: through our own command, and through TorchX's."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import cli
from tests.support.datasets import write_dataset
from tests.support.slurm_cluster import SlurmCluster
from tests.support.torchx_command import run_torchx


def settings(folder: Path) -> list[str]:
    return [f"--data.path={folder}/data", f"--output.runs_dir={folder}/runs"]


def test_papilio_preflight_asks_the_hosts_that_slurm_gives(
    slurm: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "data")
    words = ["preflight", "--recipe", "quickstart", "--nnodes", "2", "--nproc", "1", "-s", "slurm"]
    assert cli.main([*words, *settings(tmp_path), "--no-links", "--wait-s=60"]) == 0
    out = capsys.readouterr().out
    assert f"{slurm.hosts[0]}, {slurm.hosts[1]} met at {slurm.hosts[0]}:" in " ".join(out.split())
    assert "\nready" in out
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_job_whose_preflight_fails_ends_with_the_table_and_is_not_tried_again(
    slurm: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "data")
    (tmp_path / "data" / "train" / "0.arrow").unlink()
    words = ["launch", "-s", "slurm", "--follow", "train", "--recipe", "quickstart", "--nnodes", "2", "--nproc", "1"]
    status = cli.main([*words, "--preflight", "true", "--max_retries", "2", *settings(tmp_path)])
    captured = capsys.readouterr()
    out = " ".join(captured.out.split())
    assert status == 78
    assert "FAIL data" in out and "0.arrow is missing" in out and "not ready: 1 thing to mend" in out
    assert "first error: host 0: the checks before the job failed; nothing was started" in captured.err
    assert "FAILED (FAILED, status 78: it would go wrong again" in " ".join(captured.err.split())
    assert not (tmp_path / "runs").exists() or list((tmp_path / "runs").iterdir()) == []


def test_torchx_run_asks_them_too(slurm: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "data")
    words = ["papilio.preflight", "--recipe", "quickstart", "--nnodes", "2", "--nproc", "1", "--cpu", "1"]
    done = run_torchx(
        "run", "--workspace", "", "-s", "slurm", *words, "--", *settings(tmp_path), "--no-links", cwd=tmp_path
    )
    handle = done.stdout.split()[0]
    assert cli.main(["logs", "-f", handle]) == 0, done.stderr
    assert "\nready" in capsys.readouterr().out
