"""The commands of README and documentation work as they are printed there."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from papilio.launch.cli import parser_of
from papilio.launch.verbs import VERBS
from papilio.trainer.config import Config

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


def commands_of(page):
    """Every `papilio VERB ...` that stands in a code block of a page, fenced or indented, lines joined."""
    text = page.read_text("utf-8")
    blocks = re.findall(r"^```(?:sh|text)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks.append("\n".join(line.strip() for line in text.splitlines() if line.startswith("    ")))
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r"\$? ?(papilio [a-z]+ .*)", line)
            if found:
                yield re.split(r"  #| \| |; papilio", found[1])[0].strip()


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_verb_flag_and_key_of_a_page_exists(page):
    for command in commands_of(page):
        words = command.split()
        verb = next((verb for verb in VERBS if verb.name == words[1]), None)
        assert verb is not None, command
        known = set(flags_of(parser_of(verb)))
        for word in re.findall(r"(?<![\w-])--?[A-Za-z][\w.-]*", " ".join(words[2:]).split(" -- ")[0]):
            if "." in word:
                assert has_key(word.removeprefix("--")), f"{command}: {word} is no key of a recipe"
            elif verb.name != "launch":  # whose component has flags of its own
                assert word in known or word == "--help", f"{command}: papilio {verb.name} has no {word}"


def flags_of(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from flags_of(child)
        yield from action.option_strings


def has_key(key):
    """Whether a recipe has this key; below a table of free keys (`model.table_rows.user`), whether it has the table."""
    model = Config
    for part in key.split("."):
        if part not in model.model_fields:
            return False
        kind = model.model_fields[part].annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return True
        model = kind
    return True


def test_there_are_commands_to_check():
    assert sum(len(list(commands_of(page))) for page in PAGES) > 60


def test_the_site_is_built_without_a_warning_and_names_every_verb_and_key(tmp_path, environment):
    run(f"mkdocs build --quiet --strict --site-dir {tmp_path}/site", ROOT, environment)
    commands = (tmp_path / "site/reference/commands.html").read_text("utf-8")
    keys = (tmp_path / "site/reference/recipe_keys.html").read_text("utf-8")
    assert all(f"papilio {verb.name}" in commands for verb in VERBS)
    assert all(key in keys for key in ("train.global_batch_size", "sharding.replicas.", "checkpoint.every_minutes"))
