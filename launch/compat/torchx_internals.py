"""Private names of TorchX: the schedulers of a Runner, and the hooks that a scheduler has to implement.

TorchX's own guide to schedulers overrides these hooks, underscored as they are; `Scheduler` declares them abstract.
A Runner hides its schedulers, and its public methods lack what ours can do besides (log paths, notices).
"""

from __future__ import annotations

from typing import Any

from torchx.runner import Runner

from papilio.sharding.compat.private_name import PrivateName

_SCHEDULER = "torchx.schedulers.api.Scheduler"
_KUBERNETES = "torchx.schedulers.kubernetes_scheduler.KubernetesScheduler"
_SLURM = "torchx.schedulers.slurm_scheduler.SlurmScheduler"
_SUBMIT = ("self", "app", "cfg")
NEEDED = (
    PrivateName("torchx.runner.Runner", "_scheduler", "to ask a scheduler for log paths", ("self", "scheduler")),
    # Overridden by the classes in launch/schedulers/.
    PrivateName(_SCHEDULER, "_run_opts", "to declare the options of a scheduler", ("self",)),
    PrivateName(_SCHEDULER, "_submit_dryrun", "to make the request of a job", _SUBMIT),
    PrivateName(_SCHEDULER, "_cancel_existing", "to cancel a job", ("self", "app_id")),
    PrivateName(_SLURM, "_submit_dryrun", "to correct the request of TorchX", _SUBMIT),
    PrivateName(_KUBERNETES, "_submit_dryrun", "to correct the request of TorchX", _SUBMIT),
    PrivateName(_KUBERNETES, "_cancel_existing", "to explain what the cluster says", ("self", "app_id")),
    PrivateName(_KUBERNETES, "_run_opts", "to declare the options of a scheduler", ("self",)),
    PrivateName(_KUBERNETES, "_api_client", "to say that no cluster is configured", ("self",)),
    # Read by the local scheduler of launch/local_run.py.
    PrivateName(
        "torchx.schedulers.local_scheduler.LocalScheduler", "_apps", "to find the agent's process", is_assigned=True
    ),
)


def scheduler_of(runner: Runner, name: str) -> Any:
    """Return a scheduler of the runner, which hides them, for what TorchX's interface lacks."""
    return runner._scheduler(name)
