"""Papilio's components under the real `torchx` command: ours are there, TorchX's own too, and its default scheduler."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torchx.schedulers import DEFAULT_SCHEDULER_MODULES
from torchx.specs.finder import ModuleComponentsFinder

from tests.support.torchx_command import run_torchx

OURS = {"train", "evaluate", "calibrate", "preprocess", "export", "predict", "preflight", "study"}
MINIMAL = {
    "train": ["--recipe", "quickstart"],
    "evaluate": ["--run", "runs/a"],
    "calibrate": ["--output", "mine.toml"],
    "preprocess": ["--source", "criteo", "--input", "a.gz,b.gz", "--output", "d"],
    "export": ["--run", "runs/a", "--output", "p"],
    "predict": ["--package", "p", "--data", "d", "--output", "s.parquet"],
    "preflight": ["--recipe", "quickstart"],
    "study": ["--recipe", "quickstart", "--output", "s"],
}


def test_our_components_join_torchx_own_and_hide_none() -> None:
    done = run_torchx("builtins")
    assert done.returncode == 0, done.stderr
    listed = set(re.findall(r"^ *\d+\. (\S+)$", done.stdout, re.MULTILINE))
    found = ModuleComponentsFinder("torchx.components", group="").find(None)
    own = {component.name for component in found if not component.validation_errors}
    assert {"dist.torchrun", "dist.ddp", "utils.echo"} <= own
    assert listed == own | {f"papilio.{name}" for name in OURS}


def test_the_schedulers_and_the_default_stay_torchx_own() -> None:
    offered = []
    for with_ours in (True, False):
        done = run_torchx("run", "--help", with_entry_points=with_ours)
        found = re.search(r"--scheduler \{([\w,]+)\}", done.stdout)
        assert found is not None
        offered.append(found[1].split(","))
    assert offered[1] == list(DEFAULT_SCHEDULER_MODULES)
    assert sorted(offered[0]) == sorted(offered[1])
    # The first is the default.
    assert offered[0][0] == offered[1][0] == "local_docker"


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_component_runs_with_what_it_must_be_told(name: str) -> None:
    done = run_torchx(
        *("run", "--dryrun", "--json", "--workspace", "", "-s", "local_cwd", f"papilio.{name}", *MINIMAL[name])
    )
    assert done.returncode == 0, done.stderr


def test_a_mistake_is_told_in_one_line() -> None:
    words = ("-s", "slurm", "papilio.train", "--recipe", "quickstart")
    for wrong, message in (
        (["--nproc", "0"], "--nproc 0: a number from 1 to 1,024 is needed"),
        (["--name", "x --begin=now+1hour"], "--name 'x --begin=now+1hour': only letters of English"),
    ):
        done = run_torchx("run", "--dryrun", "--workspace", "", *words, *wrong)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(f"torchx: error: {message}")
        assert "Traceback" not in done.stderr


def test_torchx_own_components_still_run() -> None:
    done = run_torchx("run", "-s", "local_cwd", "utils.echo", "--msg", "still here")
    assert done.returncode == 0, done.stderr


def test_no_launch_on_pythonpath_runs_in_place_of_ours(tmp_path: Path) -> None:
    for name in ("launch", "trainer", "sharding", "data_pipeline"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the {name} of others')\n")
    for words in (["-s", "local_cwd", "papilio.train"], ["-s", "slurm", "papilio.train"]):
        done = run_torchx(
            *("run", "--dryrun", "--json", "--workspace", "", *words, "--recipe", "quickstart"),
            first=(tmp_path,),
        )
        assert done.returncode == 0, done.stderr
        assert "of others" not in done.stderr + done.stdout
