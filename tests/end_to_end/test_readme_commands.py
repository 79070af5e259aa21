"""The commands of the README and of docs/ work as they are printed there."""

import argparse
import inspect
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from papilio.launch.cli import parser_of
from papilio.launch.component_arguments import our_components
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


PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")], key=lambda path: path.relative_to(ROOT).as_posix())


def commands_of(text):
    """Every `papilio VERB ...` of a page's blocks, fenced or indented, with continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = "\n".join(
        re.findall(r"^ {4,}(.*)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.M)
    )
    for line in re.sub(r"\\\n\s*", " ", "\n".join([*blocks, indented])).splitlines():
        if match := re.match(r"(?:\w*\$ )?papilio (?!.*: )([a-z]+) ?(.*)", line.strip()):
            yield match.group(1), match.group(2).split("  #")[0]


def options_of(parser):
    """Flags of a parser and of the parsers of its actions."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {flag for nested in action.choices.values() for flag in options_of(nested)}
    return found


def is_setting_of_recipe(key):
    """Whether a recipe has section.key; what lies below a key that is a table of names is anyone's."""
    section = Config
    for name in key.split("."):
        if name not in section.model_fields:
            return False
        section = section.model_fields[name].annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return True
    return True


FLAGS = {verb.name: options_of(parser_of(verb)) for verb in VERBS}
COMPONENT_FLAGS = {
    f"--{name}" for component in our_components().values() for name in inspect.signature(component).parameters
}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_verb_flag_and_setting_of_a_page_exists(page):
    for verb, words in commands_of(page.read_text("utf-8")):
        assert verb in FLAGS, f"{page.name}: papilio {verb} {words}"
        # A job behind `launch` takes its component's arguments, and those of its own verb.
        known = FLAGS[verb] | (COMPONENT_FLAGS | FLAGS["preflight"] if verb == "launch" else set())
        for flag in re.findall(r"(?<![\w-])--([A-Za-z][\w.-]*)", words):
            exists = is_setting_of_recipe(flag) if "." in flag else f"--{flag}" in known
            assert exists, f"{page.name}: --{flag} in papilio {verb} {words}"


def test_the_check_finds_what_does_not_exist():
    page = "```sh\npapilio train --recipe R \\\n  --nprocs 2 --train.epoch=1\n```\n\n    n1$ papilio retrain\n"
    (train, words), (retrain, _) = commands_of(page)
    assert (train, retrain) == ("train", "retrain") and "retrain" not in FLAGS
    assert "--nprocs" in words and "--nprocs" not in FLAGS["train"]
    assert not is_setting_of_recipe("train.epoch") and is_setting_of_recipe("train.epochs")


def write_clicks(path):
    """A table of the columns of the tutorial, whose labels its users decide."""
    draw = random.Random(3)
    lines = ["clicked,age,user_id,page,last_items"]
    for _ in range(4000):
        user = draw.randrange(40)
        label = int(draw.random() < (0.9 if user % 2 else 0.1))
        items = f"{draw.randrange(20)} {draw.randrange(20)}"
        lines.append(f"{label},{draw.randrange(18, 80)},u{user},p{draw.randrange(40)},{items}")
    path.write_text("\n".join(lines) + "\n")


def test_the_tutorial_of_your_own_table_runs_to_scores(tmp_path, environment):
    page = (ROOT / "docs" / "tutorials" / "your_own_table.md").read_text("utf-8")
    (tmp_path / "schema.toml").write_text(re.search(r"```toml\n(.*?)```", page, re.DOTALL).group(1))
    write_clicks(tmp_path / "clicks.csv")
    commands = [(verb, words) for verb, words in commands_of(page)]
    assert [verb for verb, _ in commands] == ["preprocess", "train", "evaluate", "export", "predict", "serve"]
    outputs = {
        verb: run(f"papilio {verb} {words}", tmp_path, environment)
        for verb, words in commands
        if verb not in ("evaluate", "serve")  # the tour evaluates; a server does not end
    }
    figures = re.search(r" test +0\.(\d{4})", outputs["train"]).group(1)
    assert int(figures) > 8000, "the AUC of labels that the user decides nine times of ten"
    assert (tmp_path / "scores.parquet").stat().st_size > 0


def test_there_are_commands_to_check():
    assert sum(len(list(commands_of(page.read_text("utf-8")))) for page in PAGES) > 60


def test_the_site_is_built_without_a_warning_and_names_every_verb_and_key(tmp_path, environment):
    run(f"mkdocs build --quiet --strict --site-dir {tmp_path}/site", ROOT, environment)
    commands = (tmp_path / "site/reference/commands.html").read_text("utf-8")
    keys = (tmp_path / "site/reference/recipe_keys.html").read_text("utf-8")
    assert all(f"papilio {verb.name}" in commands for verb in VERBS)
    assert all(key in keys for key in ("train.global_batch_size", "sharding.replicas.", "checkpoint.every_minutes"))
