"""`papilio plan`: on this machine for any other, in a process of its own, since planning imports torch."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from papilio.data_pipeline.terminal import table_columns
from papilio.launch.usage import UsageError, require_files
from papilio.sharding.plan_file import read_plan_file
from papilio.sharding.reports.diff import diff_plans, format_diff
from papilio.trainer.config_file import load_config
from papilio.trainer.elastic.bootstrap import child_command


def run_plan(namespace: argparse.Namespace) -> int:
    """Plan a recipe, or compare two plan files (`papilio plan diff OLD NEW`)."""
    if namespace.words:
        return _diff(namespace.words)
    if namespace.recipe is None:
        raise UsageError("--recipe is missing: papilio plan --recipe R --hardware H, or papilio plan diff OLD NEW")
    if namespace.recipe.endswith(".toml"):
        require_files("--recipe", [namespace.recipe])
    load_config(namespace.recipe, namespace.overrides)
    return subprocess.run(_command(namespace), check=False).returncode


def _diff(words: list[str]) -> int:
    if words[0] != "diff" or len(words) != 3:
        raise UsageError(f"{' '.join(words)}: did you mean papilio plan diff OLD.json NEW.json?")
    for path in words[1:]:
        if not Path(path).is_file():
            raise UsageError(f"plan file {path} does not exist; papilio plan --recipe R --output {path} makes one")
    old, new = (read_plan_file(path) for path in words[1:])
    print(format_diff(diff_plans(old, new), table_columns()))
    return 0


def _command(namespace: argparse.Namespace) -> list[str]:
    command = child_command("papilio.trainer.run.plan_run", "--recipe", namespace.recipe)
    command += ["--num-nodes", str(namespace.num_nodes)]
    for flag in ("hardware", "ranks_per_node", "explain", "output", "html"):
        value = getattr(namespace, flag)
        if value is not None:
            command += [f"--{flag.replace('_', '-')}", str(value)]
    command += [f"--{flag}" for flag in ("json", "all") if getattr(namespace, flag)]
    return [*command, *namespace.overrides]
