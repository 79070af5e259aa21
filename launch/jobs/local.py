"""The verbs that run ranks on this machine: through the same TorchX components as on a cluster."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from papilio.data_pipeline.paths import join
from papilio.launch import components, roles
from papilio.launch.local_run import run_locally
from papilio.launch.several_hosts import meeting_of, one_host_of
from papilio.launch.usage import UsageError, refusing, require_files, require_folder
from papilio.trainer.checkpoint.selection import CHECKPOINTS
from papilio.trainer.checks.start_checks import check_evaluation, check_start
from papilio.trainer.config import Config
from papilio.trainer.config_file import load_config
from papilio.trainer.run.lock import named_at, require_unlocked

NUM_CPU_RANKS = 2


def run_train(namespace: argparse.Namespace) -> int:
    """Train a recipe; what would go wrong on every rank is found here, before any process is started."""
    recipe, overrides = namespace.recipe, namespace.overrides
    if recipe.endswith(".toml"):
        require_files("--recipe", [recipe])
    with refusing():
        config = load_config(recipe, overrides)
    meeting = meeting_of(namespace, config.output.run_dir)
    nproc = _num_ranks(namespace.nproc)
    if namespace.max_restarts < 0:
        raise UsageError(f"--max-restarts {namespace.max_restarts}: 0 for none, or more")
    job = None if meeting is None else named_at(meeting.rdzv_id, meeting.endpoint)
    with refusing():
        require_unlocked(_folders(config), job, partial(print, "papilio:", file=sys.stderr, flush=True))
        finished = check_start(config)
    if finished is not None:
        print(finished)
        return 0
    if meeting is None:
        return run_locally(
            components.train(*overrides, recipe=recipe, nproc=nproc, max_restarts=namespace.max_restarts)
        )
    words = ["papilio.trainer.train", "--recipe", recipe, *overrides]
    command = roles.agent_command(words, nproc, namespace.nnodes, max_restarts=namespace.max_restarts, meeting=meeting)
    return run_locally(one_host_of(command, nproc))


def _folders(config: Config) -> list[str]:
    """Return the folders that a run is to have for itself, as far as they are known before it begins."""
    run_dir, checkpoints = config.output.run_dir, config.checkpoint.folder
    own = [] if run_dir is None else [run_dir, *([] if checkpoints else [join(run_dir, CHECKPOINTS)])]
    return [*own, *([checkpoints] if checkpoints else [])]


def run_evaluate(namespace: argparse.Namespace) -> int:
    """Evaluate the model of a run folder."""
    require_folder("--run", namespace.run, "`papilio train`")
    if namespace.data is not None:
        require_folder("--data", namespace.data, "`papilio preprocess` or `papilio generate`")
    nproc = _num_ranks(namespace.nproc)
    with refusing():
        check_evaluation(namespace.run, namespace.data, namespace.split, namespace.checkpoint, nproc)
    app = components.evaluate(
        run=namespace.run,
        data=namespace.data,
        split=namespace.split,
        checkpoint=namespace.checkpoint,
        nproc=nproc,
    )
    return run_locally(app)


def run_calibrate(namespace: argparse.Namespace) -> int:
    """Measure this machine with 1, 2, 4... ranks busy, one job after the other, and write its hardware profile."""
    output = Path(namespace.output).absolute()
    if output.suffix != ".toml":
        raise UsageError(f"--output {namespace.output}: the name of a hardware profile ends in .toml")
    counts = namespace.ranks or _calibrated_ranks(is_quick=namespace.quick)
    if min(counts) < 1:
        raise UsageError(f"--ranks {min(counts)}: at least one rank is needed")
    for index, count in enumerate(counts):
        app = components.calibrate(output=str(output), quick=namespace.quick, fresh=index == 0, nproc=count)
        status = run_locally(app)
        if status:
            return status
    print(f"{namespace.output} holds what was measured; papilio plan --recipe R --hardware {namespace.output}")
    return 0


def _calibrated_ranks(*, is_quick: bool) -> list[int]:
    """Powers of two up to the GPUs, or up to twice the cores, since more ranks than cores take turns."""
    most = count_gpus() or 2 * len(os.sched_getaffinity(0))
    counts = [2**power for power in range(most.bit_length()) if 2**power <= most]
    return counts[:2] if is_quick else counts


def count_gpus() -> int:
    """GPUs that the driver shows, without importing torch."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def _num_ranks(asked: int | None) -> int:
    if asked is None:
        return count_gpus() or NUM_CPU_RANKS
    if asked < 1:
        raise UsageError(f"--nproc {asked}: at least one rank is needed")
    return asked
