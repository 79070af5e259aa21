"""TorchX's Runner with the schedulers of Papilio.

They are given to the Runner by name and not registered as entry points: `torchx run` keeps TorchX's own, with their
options. (But torchx_slurm.py, which `torchx` gets in the place of its own, submits what that one submits.)
"""

from __future__ import annotations

from typing import Any

from torchx.runner import Runner
from torchx.schedulers.api import Scheduler

SESSION = "papilio"
SCHEDULERS = ("slurm", "local_cwd", "kubernetes")


def make_runner() -> Runner:
    """Return a Runner of `SCHEDULERS`; each is imported when it is first asked for."""
    return Runner(SESSION, {"slurm": _slurm, "local_cwd": _local, "kubernetes": _kubernetes})


def _slurm(session_name: str, **parameters: Any) -> Scheduler[Any]:
    from papilio.launch.schedulers.slurm.scheduler import SlurmJobs

    return SlurmJobs(session_name, **parameters)


def _local(session_name: str, **parameters: Any) -> Scheduler[Any]:
    from papilio.launch.schedulers.local.scheduler import LocalJobs

    return LocalJobs(session_name, **parameters)


def _kubernetes(session_name: str, **parameters: Any) -> Scheduler[Any]:
    from papilio.launch.schedulers.kubernetes.scheduler import create_scheduler

    return create_scheduler(session_name, **parameters)
