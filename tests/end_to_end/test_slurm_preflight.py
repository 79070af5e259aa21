"""Preflights on a real Slurm: through our own command, and through TorchX's."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import cli
from tests.support.datasets import write_dataset
from tests.support.slurm_cluster import SlurmCluster
from tests.support.torchx_command import run_torchx


def settings(folder: Path) -> list[str]:
    return [f"--data.path={folder}/data", f"--output.runs_dir={folder}/runs", "--no-links", "--wait-s=60"]


@pytest.mark.parametrize("is_whole", [True, False])
def test_papilio_preflight_asks_the_hosts_that_slurm_gives(
    slurm: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_whole: bool
) -> None:
    write_dataset(tmp_path / "data")
    if not is_whole:
        (tmp_path / "data" / "train" / "0.arrow").unlink()
    words = ["preflight", "--recipe", "quickstart", "--nnodes", "2", "--nproc", "1", "-s", "slurm"]
    status = cli.main([*words, *settings(tmp_path)])
    out = capsys.readouterr().out
    words_of_it = " ".join(out.split())
    assert f"{slurm.hosts[0]}, {slurm.hosts[1]} met at {slurm.hosts[0]}:" in words_of_it
    assert status == (0 if is_whole else 1)
    assert ("\nready" in out, "\nnot ready: 1 thing to mend" in out) == (is_whole, not is_whole)
    assert ("FAIL  data" in out, "0.arrow is missing" in words_of_it) == (not is_whole, not is_whole)
    assert list((tmp_path / "runs").iterdir()) == []


def test_torchx_run_asks_them_too(slurm: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "data")
    words = ["papilio.preflight", "--recipe", "quickstart", "--nnodes", "2", "--nproc", "1", "--cpu", "1"]
    done = run_torchx("run", "--workspace", "", "-s", "slurm", *words, "--", *settings(tmp_path), cwd=tmp_path)
    handle = done.stdout.split()[0]
    assert cli.main(["logs", "-f", handle]) == 0, done.stderr
    assert "\nready" in capsys.readouterr().out
