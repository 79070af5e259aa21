"""Kubernetes with Volcano, as Papilio's own scheduler of TorchX: jobs that saved resume, manifests are checked.

It writes what TorchX's scheduler writes, and beside that

- ranks that saved and left (status 75) and pods that were evicted lead to a restart of the job, which resumes, without
  being asked for; other failures do as often as max_retries says, but a mistake that would be made again (78) never;
- every field of the manifest is checked before it is sent, here, so that a dry run needs no cluster;
- a job without an image is refused: no node could start it;
- a cluster that does not answer or refuses is told in one line;
- a name that Kubernetes would not take is refused, with how long it may be;
- recipes, profiles and plans of this machine, which no pod sees, travel in the command (launch/start.py);
- a `$` arrives as it was written; the kubelet would take $(NAME) for a variable, and make $ of $$.
"""

from __future__ import annotations

import base64
import itertools
import re
import shlex
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchx import specs
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse
from torchx.schedulers.kubernetes_scheduler import KubernetesJob, KubernetesScheduler, Opts, sanitize_for_serialization

from papilio.launch.roles import NO_IMAGE
from papilio.launch.schedulers.errors import RequestError, SchedulerError
from papilio.launch.schedulers.kubernetes.errors import explained, require_client
from papilio.launch.schedulers.kubernetes.manifest_check import MAX_POD_NAME, find_problems
from papilio.trainer.elastic.exit_codes import NO_RESTART_EXIT_CODE, RESUME_EXIT_CODE

# Volcano has one count for all restarts of a job, and gives up when it reaches maxRetry (restartingState.Execute), so
# that one restart less takes place. Where failures are retried, resumes share their number: never more than was said.
MAX_RESUMES = 10
# <job>-<14 letters that TorchX adds>-<task>-<number> is a pod's name, and its host's.
MAX_SUFFIX = 14
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
# As the API server has names of objects, and containers' runtimes those of images.
SHORT_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
OBJECT_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9.-]*[a-z0-9])?", re.ASCII)
IMAGE = re.compile(
    r"([A-Za-z0-9.-]+(:\d+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@[a-z0-9]+:[0-9a-f]+)?",
    re.ASCII,
)
# Files that are read where the job runs; others are data, for which there are mounts.
FILE_OPTIONS = ("--recipe", "--host", "--hardware", "--sharding.plan", "--sharding.hardware")
# What the words of our components run (launch/roles.py).
OUR_MODULES = (
    "papilio.launch.start",
    "papilio.trainer.elastic.agent",
    "papilio.launch.cli",
    "papilio.launch.preflight.worker",
)
FILE_SUFFIXES = (".toml", ".json")
MAX_FILE_BYTES = 256 << 10  # of a manifest, which may have 1.5 MiB, for each of its hosts


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
                raise RequestError(
                    f"the job {app.name} names no image: give --image REGISTRY/NAME:TAG, a container image that holds "
                    "Papilio"
                )
            if IMAGE.fullmatch(role.image) is None:
                raise RequestError(
                    f"--image {role.image[:200]!r}: an image is as REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:..., "
                    "NAME in small letters, without white space"
                )
            _check_name(app.name, role)
            _check_mounts(role.mounts)
        _check_settings(cfg)
        app = replace(app, roles=[replace(role, args=with_local_files(role)) for role in app.roles])
        info = super()._submit_dryrun(app, cfg)
        resource: dict[str, Any] = info.request.resource
        for task in resource["spec"]["tasks"]:
            task["policies"] = policies(app.roles[0].max_retries)
            task.pop("maxRetry", None)  # of a pod by itself, which cannot join the others again
            _escape_dollars(task["template"])
        resource["spec"]["maxRetry"] = 1 + (app.roles[0].max_retries or MAX_RESUMES)
        problems = find_problems(sanitize_for_serialization(resource))
        if problems:
            raise SchedulerError("the manifest is wrong: " + "; ".join(problems))
        return info


def _check_name(name: str, role: specs.Role) -> None:
    """Check a job's name, of which TorchX would silently drop what Kubernetes does not take.

    Raises:
        RequestError: it does not take it, or the names that are made of it are too long.
    """
    most = MAX_POD_NAME - MAX_SUFFIX - len(f"--{role.name}-{max(role.num_replicas - 1, 0)}-0")
    if NAME.fullmatch(name) is None or name.endswith(("-", "_", ".")):
        raise RequestError(
            f"--name {name!r}: on Kubernetes a name has letters of English, digits, - and _, begins with a letter and "
            "ends with none but a letter or digit, as in train-2"
        )
    if len(name) > most:
        raise RequestError(
            f"--name {name}: it has {len(name)} letters, on Kubernetes {most} are allowed here, as pods get "
            "longer names from it; shorten it"
        )


def _check_settings(cfg: Opts) -> None:
    """Check what names an object of the cluster.

    Raises:
        RequestError: none can have that name.
    """
    for key, pattern in (("namespace", SHORT_NAME), ("service_account", OBJECT_NAME), ("priority_class", OBJECT_NAME)):
        value = getattr(cfg, key)
        if value is not None and pattern.fullmatch(value) is None:
            raise RequestError(
                f"-cfg {key}={value[:80]!r}: on Kubernetes its name has small letters, digits and -, begins and ends "
                "with a letter or digit, and has 63 letters at most"
            )


def _check_mounts(mounts: Iterable[Any]) -> None:
    """Check what the API server would refuse of mounts.

    Raises:
        RequestError: it would.
    """
    taken: set[str] = set()
    for mount in mounts:
        if isinstance(mount, specs.VolumeMount) and OBJECT_NAME.fullmatch(mount.src) is None:
            raise RequestError(
                f"--mounts src={mount.src}: the name of a volume claim has small letters, digits, - and ., as in "
                "src=datasets"
            )
        if isinstance(mount, specs.BindMount) and not mount.src_path.startswith("/"):
            raise RequestError(f"--mounts src={mount.src_path}: a folder of the nodes begins with /, as in src=/data")
        if not mount.dst_path.startswith("/") or ":" in mount.dst_path:
            raise RequestError(f"--mounts dst={mount.dst_path}: a folder of the pods begins with / and has no :")
        if mount.dst_path in taken:
            raise RequestError(f"--mounts dst={mount.dst_path}: two mounts have this place; give each its own")
        taken.add(mount.dst_path)


def with_local_files(role: specs.Role) -> list[str]:
    """Return a role's arguments with the recipes, profiles and plans of this machine in them that it names.

    Raises:
        SchedulerError: one is too large for that.
    """
    args = list(role.args)
    module = next((index for index, word in enumerate(args) if word in OUR_MODULES), None)
    if module is None:
        return args
    mounted = [Path(mount.dst_path) for mount in role.mounts if not isinstance(mount, specs.DeviceMount)]
    files: dict[str, str] = {}
    words = [word for arg in args for word in (shlex.split(arg[9:]) if arg.startswith("--checks=") else [arg])]
    for before, word in itertools.pairwise(words):
        option, _, value = word.partition("=")
        path = value if option in FILE_OPTIONS else word if before in FILE_OPTIONS else ""
        if path.endswith(FILE_SUFFIXES) and not any(Path(path).is_relative_to(folder) for folder in mounted):
            content = _content(path)
            files |= {path: base64.b64encode(content).decode()} if content is not None else {}
    shipped = [f"--file={path}:{text}" for path, text in files.items()]
    if not shipped:
        return args
    if args[module] == "papilio.launch.start":
        return [*args[: module + 1], *shipped, *args[module + 1 :]]
    return [*args[:module], "papilio.launch.start", *shipped, "--", *args[module:]]


def _content(path: str) -> bytes | None:
    """Read a file of this machine; None if there is none, as one that only the image has."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SchedulerError(f"{path} cannot be read, and no pod would see it: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise SchedulerError(
            f"{path} has {len(content)} bytes, and {MAX_FILE_BYTES} at most travel with a job to pods, which do not "
            "see this machine's files: put it on a volume (--mounts) and give its path there"
        )
    return content


def _escape_dollars(pod: Any) -> None:
    for container in pod.spec.containers:
        container.command = [word.replace("$", "$$") for word in container.command or []]
        container.args = container.args and [word.replace("$", "$$") for word in container.args]
        for variable in container.env or []:
            variable.value = variable.value and variable.value.replace("$", "$$")


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
