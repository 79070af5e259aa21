"""`papilio plan`: on this machine for any other, in a process of its own, since planning imports torch."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from papilio.data_pipeline.terminal import table_columns
from papilio.launch.given_options import build_options, given_options
from papilio.launch.usage import UsageError, require_files
from papilio.sharding.plan_file import read_plan_file
from papilio.sharding.reports.diff import diff_plans, format_diff
from papilio.trainer.config_file import load_config
from papilio.trainer.elastic.bootstrap import child_command
from papilio.trainer.run.plan_options import PlanOptions


def run_plan(namespace: argparse.Namespace) -> int:
    """Plan a recipe, or compare two plan files (`papilio plan diff OLD NEW`)."""
    if namespace.words:
        return _diff(namespace.words)
    given = {name: value for name, value in given_options(namespace).items() if name != "words"}
    if "recipe" not in given:
        raise UsageError("--recipe is missing: papilio plan --recipe R --hardware H, or papilio plan diff OLD NEW")
    options = build_options(PlanOptions, {**given, "overrides": namespace.overrides}, {})
    if options.recipe.endswith(".toml"):
        require_files("--recipe", [options.recipe])
    load_config(options.recipe, options.overrides)
    command = child_command("papilio.trainer.run.plan_run", options.to_argument())
    return subprocess.run(command, check=False).returncode


def _diff(words: list[str]) -> int:
    if words[0] != "diff" or len(words) != 3:
        raise UsageError(f"{' '.join(words)}: did you mean papilio plan diff OLD.json NEW.json?")
    for path in words[1:]:
        if not Path(path).is_file():
            raise UsageError(f"plan file {path} does not exist; papilio plan --recipe R --output {path} makes one")
    old, new = (read_plan_file(path) for path in words[1:])
    print(format_diff(diff_plans(old, new), table_columns()))
    return 0
