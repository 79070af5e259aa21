"""The README's commands work as they are printed there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
TIMEOUT_S = 300


def commands_after(heading):
    """Commands of the first code block after a heading, with lines that end in a backslash joined."""
    section = README.split(f"\n{heading}\n", 1)[1]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL).group(1)
    lines = block.replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture
def environment():
    """The environment a user has once `make env` is done: its programs come first on PATH."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(command, folder, environment):
    output = subprocess.PIPE
    options = {"cwd": folder, "env": environment, "text": True, "timeout": TIMEOUT_S}
    result = subprocess.run(command, shell=True, stdout=output, stderr=subprocess.STDOUT, check=False, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout[-5000:]}"
    return result.stdout


def test_the_two_commands_are_in_the_makefile(environment):
    assert commands_after("## Two commands") == ["make train", "make test"]
    train = run("make -n train DEVICE=cpu", ROOT, environment)
    assert "run -s local_cwd launch/components.py:train --recipe launch/recipes/quickstart.toml --nproc 2" in train
    assert "-m pytest" in run("make -n test DEVICE=cpu", ROOT, environment)


def test_the_tour_runs_word_for_word(tmp_path, environment):
    outputs = {command: run(command, tmp_path, environment) for command in commands_after("## A tour")}
    verbs = [command.split()[1] if command.startswith("papilio") else "torchx" for command in outputs]
    assert verbs == ["doctor", "generate", "preprocess", "plan", "train", "evaluate", "torchx"]
    *_, train, evaluate, torchx = outputs.values()
    for output in (train, evaluate):
        figures = re.search(r"test +0\.(\d{4})", output).group(1)
        assert int(figures) > 5500, "the AUC is above .55 after one small epoch"
    trained, evaluated = (re.search(r" test +.*", output).group(0) for output in (train, evaluate))
    assert trained.split() == evaluated.split(), "evaluating the run again gives its own figures"
    assert "run folder" in torchx


def test_every_verb_of_the_program_is_in_the_readme(environment):
    listed = run("papilio --help", ROOT, environment)
    for verb in re.findall(r"^  ([a-z]+)  ", listed, re.MULTILINE):
        assert f"papilio {verb}" in README, verb
