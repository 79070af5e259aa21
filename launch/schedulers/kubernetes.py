"""Kubernetes with Volcano, as Papilio's own scheduler of TorchX: jobs that saved resume, manifests are checked.

It writes what TorchX's scheduler writes, and beside that

- ranks that saved and left (status 75) and pods that were evicted lead to a restart of the job, which resumes, without
  being asked for; other failures do as often as max_retries says, but a mistake that would be made again (78) never;
- every field of the manifest is checked before it is sent, here, so that a dry run needs no cluster;
- a job without an image is refused: no node could start it;
- a cluster that does not answer or refuses is told in one line.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torchx import specs
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse
from torchx.schedulers.kubernetes_scheduler import KubernetesJob, KubernetesScheduler, Opts, sanitize_for_serialization

from launch.roles import NO_IMAGE
from launch.schedulers.errors import SchedulerError
from launch.schedulers.kubernetes_errors import explained, require_client
from launch.schedulers.manifest_check import find_problems
from trainer.exit_codes import NO_RESTART_EXIT_CODE, RESUME_EXIT_CODE

# Volcano has one count for all restarts of a job.
MAX_RESUMES = 10


@dataclass
class KubernetesOptions(Opts):  # type: ignore[misc]
    """TorchX's settings, with defaults that need to be told nothing."""

    queue: str = "default"
    """Volcano queue to schedule the job in; Volcano makes one of this name."""

    validate_spec: bool = False
    """Let the cluster check the manifest in a dry run, too; it does so anyway when the job is submitted."""


class KubernetesJobs(KubernetesScheduler):  # type: ignore[misc]
    """TorchX's, with policies that resume and a check of what is sent."""

    def _run_opts(self) -> specs.runopts:
        return KubernetesOptions.as_runopts()

    def _api_client(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it says is said below
            client = super()._api_client()
        if not client.configuration.host:
            raise SchedulerError(
                "no Kubernetes cluster is configured here: set KUBECONFIG to a file that kubectl works with, or write "
                "the manifest with --dryrun"
            )
        return client

    def _explained(self) -> AbstractContextManager[None]:
        return explained(self._api_client().configuration.host)

    def schedule(self, dryrun_info: specs.AppDryRunInfo[KubernetesJob]) -> str:
        """Submit a job, whose image is pushed first where it was built here."""
        with self._explained():
            return str(super().schedule(dryrun_info))

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Tell the state of a job, None if the cluster knows none of this name."""
        with self._explained():
            return super().describe(app_id)

    def list(self, cfg: Mapping[str, Any] | None = None) -> list[ListAppResponse]:
        """Return all jobs of the cluster."""
        with self._explained():
            return list(super().list(cfg))

    def log_iter(self, *arguments: Any, **named: Any) -> Iterable[str]:
        """Return the lines of a pod, as they come."""
        with self._explained():
            yield from super().log_iter(*arguments, **named)

    def _cancel_existing(self, app_id: str) -> None:
        with self._explained():
            super()._cancel_existing(app_id)

    def _submit_dryrun(self, app: specs.AppDef, cfg: Opts) -> specs.AppDryRunInfo[KubernetesJob]:
        for role in app.roles:
            if role.image == NO_IMAGE:
                raise SchedulerError(
                    f"the job {app.name} names no image: give --image REGISTRY/NAME:TAG, a container image that holds "
                    "Papilio"
                )
        info = super()._submit_dryrun(app, cfg)
        resource: dict[str, Any] = info.request.resource
        for task in resource["spec"]["tasks"]:
            task["policies"] = policies(app.roles[0].max_retries)
            task.pop("maxRetry", None)  # of a pod by itself, which cannot join the others again
        resource["spec"]["maxRetry"] = MAX_RESUMES + app.roles[0].max_retries
        problems = find_problems(sanitize_for_serialization(resource))
        if problems:
            raise SchedulerError("the manifest is wrong: " + "; ".join(problems))
        return info


def policies(max_retries: int) -> list[dict[str, Any]]:
    """Return what Volcano does when a pod ends before the job is done.

    The first that fits decides (Volcano, applyPolicies), so that a status comes before the failure that it is. Without
    a policy for a failure the other hosts' agents end by themselves, and the job is told as failed.
    """
    found: list[dict[str, Any]] = [
        # Its pods stay, with their logs; of Volcano's ends this is the one that TorchX tells as a failure.
        {"exitCode": NO_RESTART_EXIT_CODE, "action": "TerminateJob"},
        {"exitCode": RESUME_EXIT_CODE, "action": "RestartJob"},
        {"event": "PodEvicted", "action": "RestartJob"},
    ]
    return found + [{"event": "PodFailed", "action": "RestartJob"}] * (max_retries > 0)


def create_scheduler(session_name: str, **parameters: Any) -> KubernetesJobs:
    """Return the scheduler, as TorchX's Runner asks for it.

    Raises:
        SchedulerError: its client is not installed.
    """
    require_client()
    return KubernetesJobs(session_name, parameters.get("client"), parameters.get("docker_client"))
