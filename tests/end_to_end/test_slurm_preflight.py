"""Preflights on a real Slurm: through our own command, and through TorchX's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from papilio.launch import cli
from tests.support.datasets import write_dataset
from tests.support.slurm_cluster import SlurmCluster
from tests.support.torchx_command import run_torchx


def settings(folder: Path) -> list[str]:
    return [f"--data.path={folder}/data", f"--output.runs_dir={folder}/runs"]


def test_preflights_of_papilio_and_of_torchx_ask_the_hosts_that_slurm_gives(
    slurm: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "data")
    words = ["--recipe", "quickstart", "--nnodes", "2", "--nproc", "1"]
    torchx = ["run", "--workspace", "", "-s", "slurm", "papilio.preflight", *words, "--cpu", "1", "--", "--no-links"]
    done = run_torchx(*torchx, *settings(tmp_path), cwd=tmp_path)
    # Beside it: its hosts have a core left.
    assert cli.main(["preflight", *words, "-s", "slurm", *settings(tmp_path), "--no-links", "--wait-s=60"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"({' met|'.join(slurm.hosts)} met) at ({'|'.join(slurm.hosts)}):", " ".join(out.split()))
    assert "\nready" in out
    assert cli.main(["logs", "-f", done.stdout.split()[0]]) == 0, done.stderr
    assert "\nready" in capsys.readouterr().out
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
    assert "FAIL data" in out and "0.arrow is missing" in out and "not ready: 1 thing to fix" in out
    assert re.search(
        r"first error: host \d: the checks before the job failed, the log of host 0 says why", captured.err
    )
    assert "FAILED (FAILED, status 78: it would go wrong again" in " ".join(captured.err.split())
    assert not (tmp_path / "runs").exists() or list((tmp_path / "runs").iterdir()) == []
