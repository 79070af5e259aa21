"""`papilio study`: how a recipe scales, measured at several numbers of ranks here and predicted for these and for more.

Each measured row is a training job of its own (`papilio train`), whose step is timed as in any run's summary; predicted
rows are the planner's, which needs no machine. A study that was interrupted goes on: runs that ended are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from papilio.launch import components
from papilio.launch.jobs.study_table import format_study
from papilio.launch.local_run import run_locally
from papilio.launch.usage import UsageError, require_files
from papilio.sharding.hardware import load_hardware
from papilio.sharding.plan_file import plan_from_json
from papilio.trainer.config import Config
from papilio.trainer.config_file import load_config
from papilio.trainer.elastic.bootstrap import child_command
from papilio.trainer.run.plan_options import PlanOptions

FORMAT_VERSION = 1
STUDY = "study.json"
MIN_STEPS = 20


@dataclass(frozen=True)
class StudyRow:
    """One number of ranks. What was not measured, or does not fit, is None; `note` says why."""

    num_ranks: int
    num_hosts: int
    global_batch_size: int
    measured_step_s: float | None = None
    predicted_step_s: float | None = None
    hardware: str | None = None
    note: str = ""

    @property
    def measured_samples_per_s(self) -> float | None:
        """Samples of a step over its median seconds."""
        return self.global_batch_size / self.measured_step_s if self.measured_step_s else None

    @property
    def predicted_samples_per_s(self) -> float | None:
        """The same, of the planner's step."""
        return self.global_batch_size / self.predicted_step_s if self.predicted_step_s else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        measured, predicted = self.measured_samples_per_s, self.predicted_samples_per_s
        error = predicted / measured - 1 if measured and predicted else None
        rates = {"measured_samples_per_s": measured, "predicted_samples_per_s": predicted, "prediction_error": error}
        return {**asdict(self), **rates}


def run_study(namespace: argparse.Namespace) -> int:
    """Measure, predict, print and write; returns the status of the first job that failed, after what was measured."""
    config = _check(namespace)
    output = Path(namespace.output)
    settings = _settings(namespace, config)
    _claim(output, settings)
    rows: list[StudyRow] = []
    status = 0
    for num_ranks in sorted(set(namespace.ranks)):
        status, row = _measure(namespace, config, num_ranks, output / f"ranks_{num_ranks:04d}")
        if row is None:
            break
        rows.append(row)
        _write(output, settings, rows)
    if status == 0:
        for num_hosts in sorted(set(namespace.predict_hosts)):
            rows.append(_predict(namespace, config, num_hosts))
    _write(output, settings, rows)
    print(json.dumps(_tree(settings, rows), indent=1) if namespace.json else format_study(_tree(settings, rows)))
    return status


def _check(namespace: argparse.Namespace) -> Config:
    if namespace.recipe.endswith(".toml"):
        require_files("--recipe", [namespace.recipe])
    for flag, numbers in (("--ranks", namespace.ranks), ("--predict-hosts", namespace.predict_hosts)):
        if any(number < 1 for number in numbers):
            raise UsageError(f"{flag} {min(numbers)}: at least one is needed")
    if namespace.steps < MIN_STEPS:
        raise UsageError(f"--steps {namespace.steps}: the first steps warm up, so at least {MIN_STEPS} are needed")
    if namespace.hardware is not None:
        load_hardware(namespace.hardware)
    config = load_config(namespace.recipe, namespace.overrides, namespace.hardware)
    if namespace.predict_hosts and config.sharding.hardware is None:
        raise UsageError("--predict-hosts needs to know the hosts: --hardware NAME, or sharding.hardware in the recipe")
    return config


def _settings(namespace: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Return what must be the same for runs to be comparable."""
    return {
        "recipe": config.name,
        "overrides": list(namespace.overrides),
        "scaling": namespace.scaling,
        "steps": namespace.steps,
        "base_ranks": min(namespace.ranks),
        "num_cores": len(os.sched_getaffinity(0)),
    }


def _claim(output: Path, settings: dict[str, Any]) -> None:
    """Begin in a new folder, or go on in that of the same study."""
    path = output / STUDY
    if path.is_file():
        before = json.loads(path.read_text("utf-8"))["settings"]
        differing = sorted(key for key in settings if before.get(key) != settings[key])
        if differing:
            raise UsageError(
                f"--output {output} holds another study, which differs in {', '.join(differing)}; give a new folder"
            )
    elif output.is_dir() and any(output.iterdir()):
        raise UsageError(f"--output {output} is not empty and holds no study; give a new folder")
    output.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        _write(output, settings, [])


def _batch_size(namespace: argparse.Namespace, config: Config, num_ranks: int) -> int:
    """Return the global batch: the recipe's, or, weakly scaled, the recipe's on the fewest ranks of the study."""
    base = config.train.global_batch_size
    return base if namespace.scaling == "strong" else base * num_ranks // min(namespace.ranks)


def _measure(
    namespace: argparse.Namespace, config: Config, num_ranks: int, run_dir: Path
) -> tuple[int, StudyRow | None]:
    """Train on so many ranks, unless it has been done; return the job's status, and the row if it succeeded."""
    batch_size = _batch_size(namespace, config, num_ranks)
    if not (run_dir / "summary.json").is_file():
        settings = [
            f"--train.max_steps={namespace.steps}",
            f"--train.global_batch_size={batch_size}",
            f"--train.log_every_steps={namespace.steps // 10}",
            f"--train.epochs={namespace.steps}",  # a data set of one batch lasts, too
            "--train.evaluate_every_steps=none",
            "--output.tensorboard=false",
            f"--output.run_dir={run_dir}",
        ]
        if config.sharding.hardware is not None:
            settings.append(f"--sharding.hardware={config.sharding.hardware}")
        print(f"papilio study: {num_ranks} rank(s), {namespace.steps} steps of {batch_size:,} samples", flush=True)
        app = components.train(
            *namespace.overrides, *settings, recipe=namespace.recipe, nproc=num_ranks, max_restarts=0
        )
        status = run_locally(app)
        if status:
            return status, None
    found = json.loads((run_dir / "summary.json").read_text("utf-8"))["comparison"]
    if found is None:
        return 0, StudyRow(num_ranks, 1, batch_size, note="too few steps to time")
    return 0, StudyRow(num_ranks, 1, batch_size, found["measured_step_s"], found["predicted_step_s"], found["hardware"])


def _predict(namespace: argparse.Namespace, config: Config, num_hosts: int) -> StudyRow:
    """Plan for so many hosts, in a process of its own: planning imports torch."""
    hardware = config.sharding.hardware
    assert hardware is not None  # _check
    num_ranks = num_hosts * load_hardware(hardware).ranks_per_host
    batch_size = _batch_size(namespace, config, num_ranks)
    options = PlanOptions(
        recipe=namespace.recipe,
        overrides=(*namespace.overrides, f"--train.global_batch_size={batch_size}"),
        hardware=hardware,
        num_nodes=num_hosts,
        as_json=True,
    )
    command = child_command("papilio.trainer.run.plan_run", options.to_argument())
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return StudyRow(num_ranks, num_hosts, batch_size, hardware=hardware, note=_reason(done.stderr))
    plan = plan_from_json(done.stdout, f"the plan for {num_hosts} hosts")
    return StudyRow(num_ranks, num_hosts, batch_size, None, plan.step.total_s, hardware)


def _reason(stderr: str) -> str:
    """Return the line in which planning says what is wrong; the remediation come after it."""
    prefix = "papilio plan: error: "
    lines = stderr.strip().splitlines() or ["planning failed"]
    return next((line.removeprefix(prefix) for line in lines if line.startswith(prefix)), lines[-1])


def _tree(settings: dict[str, Any], rows: list[StudyRow]) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, "settings": settings, "rows": [row.to_dict() for row in rows]}


def _write(output: Path, settings: dict[str, Any], rows: list[StudyRow]) -> None:
    part = output / f"{STUDY}.part"
    part.write_text(json.dumps(_tree(settings, rows), indent=1) + "\n", "utf-8")
    part.replace(output / STUDY)
