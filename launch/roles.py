"""From a job's command to a TorchX role: the parts that all components share."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchx import specs
from torchx.specs.overlays import JOIN, set_overlay

from papilio.data_pipeline.local_path import PathError, check_local_path
from papilio.launch.cli import parse_arguments
from papilio.launch.host_request import (
    MAX_HOSTS,
    MAX_PORT,
    MAX_RANKS,
    MAX_RETRIES,
    MAX_WAIT_S,
    HostRequest,
    check_request,
    require_number,
)
from papilio.launch.usage import UsageError
from papilio.launch.verb_arguments import SPLITS
from papilio.launch.verbs import VERBS
from papilio.trainer.elastic import bootstrap
from papilio.trainer.elastic.exit_codes import NO_RESTART_EXIT_CODE

# Nodes of one job come up minutes apart when a cluster is busy; on one node all are there at once.
JOIN_TIMEOUT_S = 900
LOCAL_JOIN_TIMEOUT_S = 60
# Of an elastic job: how long the hosts that are there wait for more once they are enough, and (3 times 1 s) how long a
# host may be silent. With torch's own 30 s and 3 times 5 s the loss of a host stops the others for 45 s.
LAST_CALL_TIMEOUT_S = 5
KEEP_ALIVE = "keep_alive_interval=1,keep_alive_max_attempt=3"
# What ranks that have nothing to save get between SIGTERM and SIGKILL. Below the 10 s after which TorchX's local
# scheduler kills the agent, whose ranks would live on as orphans.
SHUTDOWN_TIMEOUT_S = 5
# Of a pod, beyond what its ranks get: for the agents, which leave after their ranks.
POD_MARGIN_S = 10
# Stands in for an image where none was named; no scheduler that uses one finds it.
NO_IMAGE = "no-image-was-named"
# What no scheduler changes on the way. Slurm cuts at a comma, Kubernetes expands $(NAME), shells do more.
PLAIN_VALUE = re.compile(r"[A-Za-z0-9_./:=@%+-]*")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# bash sets these itself, and host.sh of Slurm could not.
OF_BASH = ("BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID", "RANDOM", "SECONDS", "LINENO", "GROUPS")
MAX_GRACE_S = 86_400
NUMBER = re.compile(r"\d{1,9}", re.ASCII)
MAX_NAME_LENGTH = 200


@dataclass(frozen=True)
class ExecutionEnvironment:
    """What the processes of a job find around them; None where nothing was said."""

    python: str | None
    image: str | None
    env: Mapping[str, str] | None
    mounts: Sequence[str] | None
    omp_threads: int
    max_retries: int


@dataclass(frozen=True)
class Meeting:
    """Where hosts without a scheduler meet: the store's host and port, the job's name there, how long to wait."""

    endpoint: str
    rdzv_id: str
    wait_s: int


def agent_command(
    command: Sequence[str],
    nproc: int,
    nnodes: str = "1",
    rdzv_port: int = 29_500,
    max_restarts: int = 0,
    meeting: Meeting | None = None,
) -> list[str]:
    """Return the words of the agent (trainer/elastic/agent.py) that starts `nproc` ranks of `command[0]` on a host.

    On several hosts, without a `meeting`, the words leave out where they meet; `launch/start.py` knows it once the job
    runs.
    """
    _, most = bounds(nnodes)
    require_number("--nproc", nproc, 1, MAX_RANKS)
    require_number("--max_restarts", max_restarts, 0, MAX_RETRIES)
    require_number("--rdzv_port", rdzv_port, 1, MAX_PORT)
    join_timeout_s = LOCAL_JOIN_TIMEOUT_S if most == 1 else JOIN_TIMEOUT_S
    rendezvous = [f"join_timeout={meeting.wait_s if meeting else join_timeout_s}"]
    rendezvous += [f"last_call_timeout={LAST_CALL_TIMEOUT_S}", KEEP_ALIVE] if most > 1 else []
    # Without a scheduler nobody else starts a lost store again.
    rendezvous += [f"store_timeout={meeting.wait_s}"] if meeting else []
    words = ["papilio.trainer.elastic.agent", f"--nnodes={nnodes}", f"--nproc-per-node={nproc}"]
    words += [f"--max-restarts={max_restarts}", "--rdzv-backend=c10d", f"--rdzv-conf={','.join(rendezvous)}"]
    words += [f"--rdzv-id={escape_macros(meeting.rdzv_id) if meeting else specs.macros.app_id}"]
    # Port 0: the agent takes a free one, so that jobs on one machine do not meet each other.
    endpoint = meeting.endpoint if meeting else "localhost:0" if most == 1 else None
    words += [f"--rdzv-endpoint={endpoint}"] if endpoint else []
    # After "--", or torchrun takes an argument of the module for one of its own that begins alike (--run, --run-path).
    return [*words, "--tee=3", "--role=", "-m", "--", *(escape_macros(word) for word in command)]


def verb_command(verb: str, words: Sequence[str]) -> list[str]:
    """Return the words of a verb of the command line, for a job of one process on one host.

    The verb reads them here already; wrong ones end this process with status 2, before the job waits in a queue.
    """
    parse_arguments(next(known for known in VERBS if known.name == verb), words)
    return ["papilio.launch.cli", verb, *(escape_macros(word) for word in words)]


def preflight_command(
    recipe: str, overrides: Sequence[str], request: HostRequest, nnodes: int, wait_s: float
) -> list[str]:
    """Return the words of one host's part of a preflight (launch/preflight/worker.py), without where the hosts meet."""
    require_number("--wait_s", wait_s, 1, MAX_WAIT_S)
    words = [
        "papilio.launch.preflight.worker",
        "--recipe",
        recipe,
        "--nnodes",
        str(nnodes),
        "--nproc",
        str(request.nproc),
    ]
    words += ["--index", specs.macros.replica_id, "--job", specs.macros.app_id, "--wait-s", f"{wait_s:g}"]
    words += ["--host", request.hardware] if request.hardware else []
    return [*words, *(escape_macros(word) for word in overrides)]


def preflight_before(recipe: str, overrides: Sequence[str], request: HostRequest, nnodes: str) -> list[str]:
    """Return the words of a preflight that comes before the job itself, on the same hosts (launch/start.py).

    Raises:
        UsageError: nobody knows how many hosts must be there.
    """
    fewest, most = bounds(nnodes)
    if fewest < most:
        raise UsageError(f"--preflight with --nnodes {nnodes}: it asks a fixed number of nodes; leave one of them out")
    wait_s = JOIN_TIMEOUT_S if most > 1 else LOCAL_JOIN_TIMEOUT_S
    words = preflight_command(recipe, overrides, request, most, wait_s)
    return [*words, f"--failure-status={NO_RESTART_EXIT_CODE}"]


def verb_app(
    name: str, verb: str, words: Sequence[str], request: HostRequest, execution: ExecutionEnvironment
) -> specs.AppDef:
    """Return a job of one process that does a verb of the command line."""
    return make_app(name, verb, verb_command(verb, words), request, execution)


def make_app(
    name: str,
    role_name: str,
    command: Sequence[str],
    request: HostRequest,
    execution: ExecutionEnvironment,
    nnodes: str = "1",
    rdzv_port: int | None = None,
    grace_s: int = SHUTDOWN_TIMEOUT_S,
    checks: Sequence[str] = (),
) -> specs.AppDef:
    """Return a job of one role, a replica for each host, each of which runs the module `command[0]`.

    Where there are `checks`, another module with its arguments, they come first, and must succeed.
    """
    fewest, most = bounds(nnodes)
    _check_job(name, request, execution, rdzv_port, grace_s)
    plain, carried = _split_environment(execution.env or {})
    parsed_mounts = _parse_mounts(execution.mounts or ())
    first = [f"--env={name}={escape_macros(value)}" for name, value in carried.items()]
    first += [
        f"--mounted={escape_macros(mount.dst_path)}"
        for mount in parsed_mounts
        if not isinstance(mount, specs.DeviceMount)
    ]
    if most > 1:
        first += [f"--head-node-in={specs.macros.rank0_env}", f"--rdzv-port={rdzv_port}"]
    first += [f"--checks={shlex.join(checks)}"] if checks else []
    first, command = _without_dollars(first, command)
    role = specs.Role(
        role_name,
        execution.image or NO_IMAGE,
        # An image has an interpreter of its own, at another place than the machine that submits.
        entrypoint=execution.python or (sys.executable if execution.image is None else "python3"),
        args=[*_bootstrap(execution), *(["papilio.launch.start", *first, "--", *command] if first else command)],
        env={"OMP_NUM_THREADS": str(execution.omp_threads), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace_s), **plain},
        num_replicas=most,
        min_replicas=fewest if fewest < most else None,
        max_retries=execution.max_retries,
        resource=specs.Resource(cpu=request.cpu, gpu=request.gpu, memMB=request.memory_mb),
        port_map={"c10d": rdzv_port} if most > 1 and rdzv_port is not None else {},
        mounts=parsed_mounts,
    )
    set_overlay(role, "kubernetes", "V1Pod", {"spec": _pod_settings(request, grace_s)})
    return specs.AppDef(name=name, roles=[role])


def _bootstrap(execution: ExecutionEnvironment) -> list[str]:
    """Return what starts a module (trainer/elastic/bootstrap.py): by its file where this interpreter runs the job.

    Another interpreter finds Papilio where it is installed there, and not in the working directory (-P).
    """
    if execution.python is None and execution.image is None:
        return [escape_macros(bootstrap.FILE), "-m"]
    return ["-P", "-m", "papilio.trainer.elastic.bootstrap", "-m"]


def bounds(nnodes: str) -> tuple[int, int]:
    """Read "4" or "2:4" as the fewest and the most."""
    fewest, colon, most = nnodes.partition(":")
    most = most if colon else fewest
    if not (NUMBER.fullmatch(fewest) and NUMBER.fullmatch(most) and int(fewest) <= int(most)):
        raise UsageError(f"--nnodes is a number of nodes, or the fewest and the most, as in 4 or 2:4; got {nnodes}")
    for count in (fewest, most):
        require_number("--nnodes", int(count), 1, MAX_HOSTS)
    return int(fewest), int(most)


def require_split(split: str) -> None:
    """Check the name of a part of a data set.

    Raises:
        UsageError: there is no such part.
    """
    if split not in SPLITS:
        raise UsageError(f"--split {split}: one of {', '.join(SPLITS)} is needed")


def require_disk(flag: str, path: str) -> None:
    """Check that a path is one of the hosts' files.

    Raises:
        UsageError: it is a URI.
    """
    try:
        check_local_path(path, flag)
    except PathError as error:
        raise UsageError(str(error)) from None


def powers_of_two(most: int) -> list[int]:
    """Return 1, 2, 4... up to `most`."""
    return [1 << power for power in range(most.bit_length())]


def escape_macros(word: str) -> str:
    """Keep TorchX from taking a `$` for the beginning of one of its macros."""
    return word.replace("$", "$$")


def _check_job(
    name: str, request: HostRequest, execution: ExecutionEnvironment, rdzv_port: int | None, grace_s: int
) -> None:
    """Check what all components take, whatever scheduler gets the job; what only one of them refuses, it checks."""
    if not name.strip() or not name.isprintable() or len(name) > MAX_NAME_LENGTH:
        raise UsageError(
            f"--name {name[:MAX_NAME_LENGTH]!r}: 1 to {MAX_NAME_LENGTH} letters that can be printed are needed"
        )
    if execution.python is not None and not execution.python.strip():
        raise UsageError("--python '': it is empty; give the path of an interpreter, or leave it out")
    check_request(request, execution.omp_threads, execution.max_retries)
    require_number("--grace_s", grace_s, 1, MAX_GRACE_S)
    if rdzv_port is not None:
        require_number("--rdzv_port", rdzv_port, 1, MAX_PORT)


def _without_dollars(first: list[str], command: Sequence[str]) -> tuple[list[str], Sequence[str]]:
    """Write a literal `$` as a mark that launch/start.py reads, if there is one.

    Kubernetes puts the value of a variable in the place of $(NAME) in a command, and makes $ of $$.
    """
    escaped = escape_macros("$")
    if not any(escaped in word for word in [*first, *command]):
        return first, command
    text = "\n".join([*first, *command])
    mark = next(mark for mark in map("_DOLLAR{}_".format, itertools.count()) if mark not in text)
    first, command = ([word.replace(escaped, mark) for word in words] for words in (first, command))
    return [f"--dollar={mark}", *first], command


def _pod_settings(request: HostRequest, grace_s: int) -> dict[object, object]:
    """What TorchX leaves out of a pod: time to save, and a bound of /dev/shm, whose pages count as the pod's memory.

    Kubernetes gives 30 s, which may be too few; half the memory for /dev/shm is what Linux itself allows.
    """
    shared = {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{request.memory_mb // 2}M"}}
    return {"terminationGracePeriodSeconds": grace_s + POD_MARGIN_S, JOIN("volumes", on="name"): [shared]}


def _parse_mounts(words: Sequence[str]) -> list[specs.BindMount | specs.VolumeMount | specs.DeviceMount]:
    try:
        return list(specs.parse_mounts(list(words)))
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"--mounts {','.join(words)}: {error.args[0]}; as in type=volume,src=CLAIM,dst=FOLDER or "
            "type=bind,src=FOLDER,dst=FOLDER,readonly"
        ) from None


def _split_environment(env: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Part the variables into those that every scheduler passes on whole, and those that travel in the command."""
    for name in env:
        if not VARIABLE.fullmatch(name):
            raise UsageError(f"--env {name}=...: {name!r} is not a variable's name (letters, digits, _)")
        if name == "OMP_NUM_THREADS":
            raise UsageError("--env OMP_NUM_THREADS=...: say it with --omp_threads")
        if name == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT":
            raise UsageError(f"--env {name}=...: say it with --grace_s")
    carried = {name: value for name, value in env.items() if name in OF_BASH or not PLAIN_VALUE.fullmatch(value)}
    return {name: value for name, value in env.items() if name not in carried}, carried
