"""TorchX components: what one job of Papilio is, whatever scheduler runs it.

    torchx run -s local_cwd launch/components.py:train --recipe launch/recipes/quickstart.toml --nproc 2
    torchx run papilio.train --recipe quickstart -- --train.epochs=2        # once installed

Torch is not imported here: the machine that submits a job needs none. Nor are annotations postponed here
(`from __future__ import annotations`): TorchX reads them as types, not as text.
"""

import shlex
import sys

from torchx import specs

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
# What a training job gets, to save: below the 30 s that Slurm (KillWait) and Kubernetes give by default.
# `papilio train` waits for it; under `torchx run -s local_cwd`, which does not, ranks without an agent end themselves.
GRACE_S = 25


def train(
    *overrides: str,
    recipe: str,
    nproc: int = 2,
    nnodes: str = "1",
    name: str = "train",
    python: str | None = None,
    image: str = "papilio",
    cpu: int = 2,
    gpu: int = 0,
    memory_mb: int = 4096,
    omp_threads: int = 1,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    max_restarts: int = 3,
    grace_s: int = GRACE_S,
) -> specs.AppDef:
    """Plan, train and evaluate the model of a recipe on nproc ranks of each of nnodes nodes.

    Args:
        overrides: settings that replace the recipe's, after `--`, each as --section.key=value
        recipe: path of a .toml file, or the bare name of a recipe that comes with Papilio
        nproc: ranks on each node; on GPUs, one for each
        nnodes: number of nodes, or the fewest and the most of an elastic job: 4, or 2:4
        name: name of the job
        python: interpreter that runs the ranks (default: the one that runs this command)
        image: container image, for schedulers that use one
        cpu: cores to ask of the scheduler for each node
        gpu: GPUs to ask of the scheduler for each node
        memory_mb: memory to ask of the scheduler for each node, in MB
        omp_threads: threads of each rank inside a CPU operator
        max_retries: how often the scheduler starts the job again after a failure, where it can
        rdzv_port: port on the first node where the nodes meet; unused with one node
        max_restarts: failures after which the ranks are started again in place; an hour without one clears the count
        grace_s: seconds that ranks get to save when they are told to end; less than the scheduler gives
    """
    command = ["trainer.train", "--recipe", recipe, *overrides]
    resource = specs.Resource(cpu=cpu, gpu=gpu, memMB=memory_mb)
    role = _agent_role(
        "train", command, nproc=nproc, nnodes=nnodes, python=python, rdzv_port=rdzv_port, max_restarts=max_restarts
    )
    role.env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(grace_s)
    return _app(name, role, image=image, resource=resource, omp_threads=omp_threads, max_retries=max_retries)


def evaluate(
    run: str,
    data: str | None = None,
    split: str = "test",
    nproc: int = 2,
    nnodes: int = 1,
    name: str = "evaluate",
    python: str | None = None,
    image: str = "papilio",
    cpu: int = 2,
    gpu: int = 0,
    memory_mb: int = 4096,
    omp_threads: int = 1,
    max_retries: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Evaluate the trained model of a run folder on one split of a data set.

    Args:
        run: the run folder, as the training job printed it
        data: folder of the data set (default: the one it was trained on)
        split: train, validation or test
        nproc: ranks on each node; on GPUs, one for each
        nnodes: number of nodes
        name: name of the job
        python: interpreter that runs the ranks (default: the one that runs this command)
        image: container image, for schedulers that use one
        cpu: cores to ask of the scheduler for each node
        gpu: GPUs to ask of the scheduler for each node
        memory_mb: memory to ask of the scheduler for each node, in MB
        omp_threads: threads of each rank inside a CPU operator
        max_retries: how often the scheduler starts the job again after a failure, where it can
        rdzv_port: port on the first node where the nodes meet; unused with one node
    """
    command = ["trainer.evaluate", "--run", run, "--split", split, *(["--data", data] if data else [])]
    resource = specs.Resource(cpu=cpu, gpu=gpu, memMB=memory_mb)
    role = _agent_role("evaluate", command, nproc=nproc, nnodes=str(nnodes), python=python, rdzv_port=rdzv_port)
    return _app(name, role, image=image, resource=resource, omp_threads=omp_threads, max_retries=max_retries)


def calibrate(
    output: str,
    quick: bool = False,
    fresh: bool = True,
    nproc: int = 2,
    name: str = "calibrate",
    python: str | None = None,
    image: str = "papilio",
    cpu: int = 2,
    gpu: int = 0,
    memory_mb: int = 8192,
    omp_threads: int = 1,
    max_retries: int = 0,
) -> specs.AppDef:
    """Measure one host with nproc busy ranks and write its hardware profile, or add to it.

    Args:
        output: TOML file of the profile
        quick: few and small measurements, to try
        fresh: begin the file anew; otherwise the figures of nproc ranks are added to what it has
        nproc: ranks on the host
        name: name of the job
        python: interpreter that runs the ranks (default: the one that runs this command)
        image: container image, for schedulers that use one
        cpu: cores to ask of the scheduler
        gpu: GPUs to ask of the scheduler
        memory_mb: memory to ask of the scheduler, in MB
        omp_threads: threads of each rank inside a CPU operator
        max_retries: how often the scheduler starts the job again after a failure, where it can
    """
    command = ["trainer.calibrate", "--output", output]
    command += [flag for flag, is_on in (("--quick", quick), ("--fresh", fresh)) if is_on]
    resource = specs.Resource(cpu=cpu, gpu=gpu, memMB=memory_mb)
    role = _agent_role("calibrate", command, nproc=nproc, nnodes="1", python=python, rdzv_port=0)
    return _app(name, role, image=image, resource=resource, omp_threads=omp_threads, max_retries=max_retries)


def export(
    run: str,
    output: str,
    quantize: str = "int8",
    size_budget: float | None = None,
    quantizer: str = "least_squares",
    table: str = "",
    data: str | None = None,
    min_auc_ratio: float = 0.999,
    checkpoint: str = "latest",
    gate: bool = True,
    name: str = "export",
    python: str | None = None,
    image: str = "papilio",
    cpu: int = 2,
    memory_mb: int = 8192,
    omp_threads: int = 2,
    max_retries: int = 0,
) -> specs.AppDef:
    """Make a quantized package of a run on one host, if it ranks as well as the model does; no GPU is used.

    Args:
        run: a run folder, or the folder of its checkpoints
        output: the package: a new folder on a disk of the host
        quantize: precision of all tables (fp32, fp16, int8, int4, int2), or auto
        size_budget: with auto, size of all tables as a share of fp32's
        quantizer: how ranges of int4 and int2 rows are chosen (minmax, greedy, least_squares)
        table: precisions of single tables, PATTERN=PRECISION, several with commas between them
        data: data set with held-out samples and vocabularies (default: the run's)
        min_auc_ratio: least AUC, as a share of the fp32 model's
        checkpoint: a checkpoint's name, its step, latest or best
        gate: measure what the package costs, and refuse one that costs too much
        name: name of the job
        python: interpreter that runs it (default: the one that runs this command)
        image: container image, for schedulers that use one
        cpu: cores to ask of the scheduler
        memory_mb: memory to ask of the scheduler, in MB
        omp_threads: threads inside a CPU operator
        max_retries: how often the scheduler starts the job again after a failure, where it can
    """
    words = [f"--run={run}", f"--output={output}", f"--quantize={quantize}", f"--quantizer={quantizer}"]
    words += [f"--min-auc-ratio={min_auc_ratio}", f"--checkpoint={checkpoint}"]
    words += [f"--size-budget={size_budget}"] if size_budget is not None else []
    words += [f"--data={data}"] if data is not None else []
    words += [f"--table={choice}" for choice in table.split(",") if choice]
    words += [] if gate else ["--no-gate"]
    command = ["-m", "trainer.export", *(_escape_macros(word) for word in words)]
    role = specs.Role("export", "", entrypoint=python or sys.executable, args=command)
    # Threads that spin while they wait take the cores from whatever else runs on the host.
    role.env["OMP_WAIT_POLICY"] = "passive"
    resource = specs.Resource(cpu=cpu, gpu=0, memMB=memory_mb)
    return _app(name, role, image=image, resource=resource, omp_threads=omp_threads, max_retries=max_retries)


def _app(
    name: str, role: specs.Role, *, image: str, resource: specs.Resource, omp_threads: int, max_retries: int
) -> specs.AppDef:
    role.image = image
    role.resource = resource
    role.max_retries = max_retries
    role.env["OMP_NUM_THREADS"] = str(omp_threads)
    role.env.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_TIMEOUT_S))
    return specs.AppDef(name=name, roles=[role])


def _agent_role(
    role_name: str,
    command: list[str],
    *,
    nproc: int,
    nnodes: str,
    python: str | None,
    rdzv_port: int,
    max_restarts: int = 0,
) -> specs.Role:
    """One replica a node, each an agent (trainer/agent.py) that starts `nproc` ranks of the module `command[0]`."""
    fewest, most = _bounds(nnodes)
    if nproc < 1 or fewest < 1:
        raise ValueError(f"nproc and nnodes must be at least 1; got nproc = {nproc}, nnodes = {nnodes}")
    python = python or sys.executable
    rendezvous = [f"join_timeout={LOCAL_JOIN_TIMEOUT_S if most == 1 else JOIN_TIMEOUT_S}"]
    rendezvous += [f"last_call_timeout={LAST_CALL_TIMEOUT_S}", KEEP_ALIVE] if most > 1 else []
    before = ["-m", "trainer.agent", f"--nnodes={nnodes}", f"--nproc-per-node={nproc}"]
    before += [f"--max-restarts={max_restarts}", "--rdzv-backend=c10d", f"--rdzv-conf={','.join(rendezvous)}"]
    before += [f"--rdzv-id={specs.macros.app_id}"]
    # After "--", or torchrun takes an argument of the module for one of its own that begins alike (--run, --run-path).
    after = ["--tee=3", "--role=", "-m", "--", *(_escape_macros(word) for word in command)]
    if most == 1:
        # Port 0: the agent takes a free one, so that jobs on one machine do not meet each other.
        return specs.Role(role_name, "", entrypoint=python, args=[*before, "--rdzv-endpoint=localhost:0", *after])
    script = _refuse_without_head_node() + " ".join(
        ["exec", shlex.join([python, *before]), f'--rdzv-endpoint="$$head_node":{rdzv_port}', shlex.join(after)]
    )
    return specs.Role(
        role_name,
        "",
        entrypoint="bash",
        args=["-c", script],
        num_replicas=most,
        min_replicas=fewest if fewest < most else None,
        port_map={"c10d": rdzv_port},
    )


def _bounds(nnodes: str) -> tuple[int, int]:
    """Read "4" or "2:4" as the fewest and the most."""
    fewest, colon, most = nnodes.partition(":")
    most = most if colon else fewest
    if not (fewest.isdigit() and most.isdigit() and int(fewest) <= int(most)):
        raise ValueError(f"nnodes is a number of nodes, or the fewest and the most, as in 4 or 2:4; got {nnodes}")
    return int(fewest), int(most)


def _refuse_without_head_node() -> str:
    """Shell lines that set `head_node`, or end the job where torchx's own component would fall back to localhost.

    With that fallback every node trains alone, each believing it is the whole job. `$$` is TorchX's spelling of `$`;
    the macro is the name of the variable in which this scheduler gives the host of the first node.
    """
    variable = specs.macros.rank0_env
    message = (
        f"papilio: error: the scheduler did not say which host is the first node: the variable {variable} is empty "
        "here, so the nodes cannot find each other. Run on one node (--nnodes 1), use a scheduler that sets it, or "
        f"export {variable}=HOST on every node"
    )
    return f'head_node="$${{{variable}:-}}"\nif [ -z "$$head_node" ]; then echo "{message}" >&2; exit 2; fi\n'


def _escape_macros(word: str) -> str:
    return word.replace("$", "$$")
