"""TorchX components: what one job of Papilio is, whatever scheduler runs it.

    torchx run -s local_cwd launch/components.py:train --recipe launch/recipes/quickstart.toml --nproc 2
    torchx run papilio.train --recipe quickstart -- --train.epochs=2        # once installed

Torch is not imported here: the machine that submits a job needs none. Nor are annotations postponed here
(`from __future__ import annotations`): TorchX reads them as types, not as text. It takes every function that it finds
here for a component, so that only modules and classes are imported.
"""

from torchx import specs

from papilio.launch import host_request as hosts
from papilio.launch import roles
from papilio.launch.roles import ExecutionEnvironment
from papilio.launch.torchx_errors import OneLineErrors

OneLineErrors.install()

# What a training job gets, to save: below the 30 s that Slurm (KillWait) and Kubernetes give by default.
# `papilio train` waits for it; under `torchx run -s local_cwd`, which does not, ranks without an agent end themselves.
GRACE_S = 25


def train(
    *overrides: str,
    recipe: str,
    host: str | None = None,
    nproc: int | None = None,
    nnodes: str = "1",
    name: str = "train",
    python: str | None = None,
    image: str | None = None,
    cpu: int | None = None,
    gpu: int | None = None,
    memory_mb: int | None = None,
    env: dict[str, str] | None = None,
    mounts: list[str] | None = None,
    omp_threads: int = 1,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    max_restarts: int = 3,
    grace_s: int = GRACE_S,
    preflight: bool = False,
) -> specs.AppDef:
    """Plan, train and evaluate the model of a recipe on nproc ranks of each of nnodes nodes.

    Args:
        overrides: settings that replace the recipe's, after `--`, each as --section.key=value
        recipe: path of a .toml file, or the bare name of a recipe that comes with Papilio
        host: hardware profile of the nodes, or a file of `papilio calibrate`: what to ask for, and what to plan for
        nproc: ranks on each node (default: one for each GPU of the host profile, or 2)
        nnodes: number of nodes, or the fewest and the most of an elastic job: 4, or 2:4
        name: name of the job
        python: interpreter that runs the ranks (default: the image's python3, or the one that runs this command)
        image: container image, for kubernetes; its python3 runs the job
        cpu: cores to ask for on each node (default: the host profile's, or one for each thread of the ranks)
        gpu: GPUs to ask for on each node (default: with a GPU host profile one for each rank, else none)
        memory_mb: memory to ask for on each node, in MB (default: nine tenths of the host profile's, or 4096)
        env: variables for the job, NAME=VALUE,NAME=VALUE; a value may have commas
        mounts: storage, as type=volume,src=CLAIM,dst=FOLDER or type=bind,src=FOLDER,dst=FOLDER[,readonly]
        omp_threads: threads of each rank inside a CPU operator
        max_retries: how often the scheduler starts the job again after a failure; it goes on from its checkpoint
        rdzv_port: port on the first node where the nodes meet; unused with one node
        max_restarts: failures after which the ranks are started again in place; an hour without one clears the count
        grace_s: seconds that ranks get to save when they are told to end; less than the scheduler gives
        preflight: ask first on all nodes whether the job would run there, and end it with the table if it would not
    """
    asked = hosts.request_host(host, nproc=nproc, cpu=cpu, gpu=gpu, memory_mb=memory_mb, omp_threads=omp_threads)
    words = [
        "papilio.trainer.train",
        "--recipe",
        recipe,
        *([f"--host={asked.hardware}"] if asked.hardware else []),
        *overrides,
    ]
    command = roles.agent_command(words, asked.nproc, nnodes, rdzv_port, max_restarts)
    around = ExecutionEnvironment(python, image, env, mounts, omp_threads, max_retries)
    checks = roles.preflight_before(recipe, overrides, asked, nnodes) if preflight else []
    return roles.make_app(name, "train", command, asked, around, nnodes, rdzv_port, grace_s, checks)


def evaluate(
    run: str,
    data: str | None = None,
    split: str = "test",
    checkpoint: str = "latest",
    host: str | None = None,
    nproc: int | None = None,
    nnodes: int = 1,
    name: str = "evaluate",
    python: str | None = None,
    image: str | None = None,
    cpu: int | None = None,
    gpu: int | None = None,
    memory_mb: int | None = None,
    env: dict[str, str] | None = None,
    mounts: list[str] | None = None,
    omp_threads: int = 1,
    max_retries: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Evaluate the trained model of a run folder on one split of a data set.

    Args:
        run: the run folder, as the training job printed it
        data: folder of the data set (default: the one it was trained on)
        split: train, validation or test
        checkpoint: a checkpoint's name, its step, latest or best
        host: hardware profile of the nodes, or a file of `papilio calibrate`: what to ask for
        nproc: ranks on each node (default: one for each GPU of the host profile, or 2)
        nnodes: number of nodes
        name: name of the job
        python: interpreter that runs the ranks (default: the image's python3, or the one that runs this command)
        image: container image, for kubernetes; its python3 runs the job
        cpu: cores to ask for on each node (default: the host profile's, or one for each thread of the ranks)
        gpu: GPUs to ask for on each node (default: with a GPU host profile one for each rank, else none)
        memory_mb: memory to ask for on each node, in MB (default: nine tenths of the host profile's, or 4096)
        env: variables for the job, NAME=VALUE,NAME=VALUE; a value may have commas
        mounts: storage, as type=volume,src=CLAIM,dst=FOLDER or type=bind,src=FOLDER,dst=FOLDER[,readonly]
        omp_threads: threads of each rank inside a CPU operator
        max_retries: how often the scheduler starts the job again after a failure, where it can
        rdzv_port: port on the first node where the nodes meet; unused with one node
    """
    asked = hosts.request_host(host, nproc=nproc, cpu=cpu, gpu=gpu, memory_mb=memory_mb, omp_threads=omp_threads)
    roles.require_split(split)
    roles.require_disk("--run", run)
    words = ["papilio.trainer.run.evaluate_run", "--run", run, "--split", split, *(["--data", data] if data else [])]
    words += ["--checkpoint", checkpoint] if checkpoint != "latest" else []
    command = roles.agent_command(words, asked.nproc, str(nnodes), rdzv_port)
    around = ExecutionEnvironment(python, image, env, mounts, omp_threads, max_retries)
    return roles.make_app(name, "evaluate", command, asked, around, str(nnodes), rdzv_port)


def calibrate(
    output: str,
    quick: bool = False,
    fresh: bool = True,
    nproc: int = 2,
    name: str = "calibrate",
    python: str | None = None,
    image: str | None = None,
    cpu: int | None = None,
    gpu: int = 0,
    memory_mb: int = 8192,
    env: dict[str, str] | None = None,
    mounts: list[str] | None = None,
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
        python: interpreter that runs the ranks (default: the image's python3, or the one that runs this command)
        image: container image, for kubernetes; its python3 runs the job
        cpu: cores to ask for (default: one for each thread of the ranks)
        gpu: GPUs to ask for
        memory_mb: memory to ask for, in MB
        env: variables for the job, NAME=VALUE,NAME=VALUE; a value may have commas
        mounts: storage, as type=volume,src=CLAIM,dst=FOLDER or type=bind,src=FOLDER,dst=FOLDER[,readonly]
        omp_threads: threads of each rank inside a CPU operator
        max_retries: how often the scheduler starts the job again after a failure, where it can
    """
    roles.require_disk("--output", output)
    words = ["papilio.trainer.calibration.calibrate", "--output", output]
    words += [flag for flag, is_on in (("--quick", quick), ("--fresh", fresh)) if is_on]
    asked = hosts.request_host(None, nproc=nproc, cpu=cpu, gpu=gpu, memory_mb=memory_mb, omp_threads=omp_threads)
    around = ExecutionEnvironment(python, image, env, mounts, omp_threads, max_retries)
    return roles.make_app(name, "calibrate", roles.agent_command(words, nproc), asked, around)


def preprocess(
    *options: str,
    source: str,
    input: list[str],
    output: str,
    name: str = "preprocess",
    python: str | None = None,
    image: str | None = None,
    cpu: int = 8,
    memory_mb: int = 16384,
    env: dict[str, str] | None = None,
    mounts: list[str] | None = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Turn raw click logs or a table into a data set on one host; started again, it goes on where it was.

    Args:
        options: others of `papilio preprocess`, after `--`, as --split days
        source: criteo or table
        input: raw files, with commas between them
        output: folder of the data set
        name: name of the job
        python: interpreter that runs it (default: the image's python3, or the one that runs this command)
        image: container image, for kubernetes; its python3 runs the job
        cpu: cores to ask for, and as many threads or processes
        memory_mb: memory to ask for, in MB
        env: variables for the job, NAME=VALUE,NAME=VALUE; a value may have commas
        mounts: storage, as type=volume,src=CLAIM,dst=FOLDER or type=bind,src=FOLDER,dst=FOLDER[,readonly]
        max_retries: how often the scheduler starts the job again after a failure, where it can
    """
    words = ["--source", source, "--input", *input, "--output", output, "--num-workers", str(cpu), *options]
    around = ExecutionEnvironment(python, image, env, mounts, 1, max_retries)
    return roles.verb_app(name, "preprocess", words, hosts.one_process(cpu, memory_mb), around)


def export(
    run: str,
    output: str,
    quantize: str = "int8",
    size_budget: float | None = None,
    quantizer: str = "least_squares",
    table: list[str] | None = None,
    data: str | None = None,
    min_auc_ratio: float = 0.999,
    checkpoint: str = "latest",
    gate: bool = True,
    name: str = "export",
    python: str | None = None,
    image: str | None = None,
    cpu: int = 2,
    memory_mb: int = 8192,
    env: dict[str, str] | None = None,
    mounts: list[str] | None = None,
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
        python: interpreter that runs it (default: the image's python3, or the one that runs this command)
        image: container image, for kubernetes; its python3 runs the job
        cpu: cores to ask for, and as many threads or processes
        memory_mb: memory to ask for, in MB
        env: variables for the job, NAME=VALUE,NAME=VALUE; a value may have commas
        mounts: storage, as type=volume,src=CLAIM,dst=FOLDER or type=bind,src=FOLDER,dst=FOLDER[,readonly]
        max_retries: how often the scheduler starts the job again after a failure, where it can
    """
    words = [f"--run={run}", f"--output={output}", f"--quantize={quantize}", f"--quantizer={quantizer}"]
    words += [f"--min-auc-ratio={min_auc_ratio}", f"--checkpoint={checkpoint}"]
    words += [f"--size-budget={size_budget}"] if size_budget is not None else []
    words += [f"--data={data}"] if data is not None else []
    words += [*(f"--table={choice}" for choice in table or []), *([] if gate else ["--no-gate"])]
    around = ExecutionEnvironment(python, image, env, mounts, cpu, max_retries)
    return roles.verb_app(name, "export", words, hosts.one_process(cpu, memory_mb), around)


def predict(
    package: str,
    output: str,
    data: str | None = None,
    split: str | None = None,
    input: list[str] | None = None,
    source: str | None = None,
    name: str = "predict",
    python: str | None = None,
    image: str | None = None,
    cpu: int = 4,
    memory_mb: int = 8192,
    env: dict[str, str] | None = None,
    mounts: list[str] | None = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Score a data set, or raw files, with a package, on one host; no GPU is used.

    Args:
        package: folder of the package
        output: Parquet file of the scores
        data: folder of a preprocessed data set
        split: of the data set: train, validation or test (default: test)
        input: instead of a data set: raw files, with commas between them
        source: of raw files: criteo or table
        name: name of the job
        python: interpreter that runs it (default: the image's python3, or the one that runs this command)
        image: container image, for kubernetes; its python3 runs the job
        cpu: cores to ask for, and as many threads or processes
        memory_mb: memory to ask for, in MB
        env: variables for the job, NAME=VALUE,NAME=VALUE; a value may have commas
        mounts: storage, as type=volume,src=CLAIM,dst=FOLDER or type=bind,src=FOLDER,dst=FOLDER[,readonly]
        max_retries: how often the scheduler starts the job again after a failure, where it can
    """
    words = ["--package", package, "--output", output, "--threads", str(cpu)]
    given = {"data": data, "split": split, "source": source}
    words += [word for flag, value in given.items() if value is not None for word in (f"--{flag}", value)]
    words += ["--input", *input] if input else []
    around = ExecutionEnvironment(python, image, env, mounts, cpu, max_retries)
    return roles.verb_app(name, "predict", words, hosts.one_process(cpu, memory_mb), around)


def study(
    *overrides: str,
    recipe: str,
    output: str,
    ranks: list[str] | None = None,
    hosts_predicted: list[str] | None = None,
    steps: int = 200,
    scaling: str = "strong",
    host: str | None = None,
    name: str = "study",
    python: str | None = None,
    image: str | None = None,
    cpu: int | None = None,
    gpu: int | None = None,
    memory_mb: int | None = None,
    env: dict[str, str] | None = None,
    mounts: list[str] | None = None,
    omp_threads: int = 1,
    max_retries: int = 0,
) -> specs.AppDef:
    """Measure training at several numbers of ranks of one host, beside the planner's prediction for these and more.

    Args:
        overrides: settings that replace the recipe's, after `--`, each as --section.key=value
        recipe: path of a .toml file, or the bare name of a recipe that comes with Papilio
        output: folder of the measured runs and of study.json
        ranks: numbers of ranks to measure, as 1,2,4 (default: 1, 2, 4, ... of the host)
        hosts_predicted: numbers of hosts to predict, too, as 2,4,8
        steps: steps of each measured run
        scaling: strong: the global batch stays; weak: each rank's batch stays
        host: hardware profile of the nodes, or a file of `papilio calibrate`: what to ask for, and what to plan for
        name: name of the job
        python: interpreter that runs the ranks (default: the image's python3, or the one that runs this command)
        image: container image, for kubernetes; its python3 runs the job
        cpu: cores to ask for on each node (default: the host profile's, or one for each thread of the ranks)
        gpu: GPUs to ask for on each node (default: with a GPU host profile one for each rank, else none)
        memory_mb: memory to ask for on each node, in MB (default: nine tenths of the host profile's, or 4096)
        env: variables for the job, NAME=VALUE,NAME=VALUE; a value may have commas
        mounts: storage, as type=volume,src=CLAIM,dst=FOLDER or type=bind,src=FOLDER,dst=FOLDER[,readonly]
        omp_threads: threads of each rank inside a CPU operator
        max_retries: how often the scheduler starts the job again after a failure, where it can
    """
    asked = hosts.request_host(
        host,
        nproc=hosts.largest("--ranks", ranks),
        cpu=cpu,
        gpu=gpu,
        memory_mb=memory_mb,
        omp_threads=omp_threads,
    )
    words = ["--recipe", recipe, "--output", output, "--steps", str(steps), "--scaling", scaling]
    words += ["--ranks", *ranks] if ranks else ["--ranks", *map(str, roles.powers_of_two(asked.nproc))]
    words += ["--predict-hosts", *hosts_predicted] if hosts_predicted else []
    words += ["--hardware", asked.hardware] if asked.hardware else []
    around = ExecutionEnvironment(python, image, env, mounts, omp_threads, max_retries)
    command = roles.verb_command("study", [*words, *overrides])
    return roles.make_app(name, "study", command, asked, around)


def preflight(
    *overrides: str,
    recipe: str,
    host: str | None = None,
    nproc: int | None = None,
    nnodes: int = 1,
    wait_s: float = 120.0,
    name: str = "preflight",
    python: str | None = None,
    image: str | None = None,
    cpu: int | None = None,
    gpu: int | None = None,
    memory_mb: int | None = None,
    env: dict[str, str] | None = None,
    mounts: list[str] | None = None,
    omp_threads: int = 1,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Ask on every node of a job, in a minute or two, whether the job would run there; node 0 prints the table.

    Args:
        overrides: settings that replace the recipe's, after `--`; also --json, --no-links, --read-gib=N, --data-port=N
        recipe: path of a .toml file, or the bare name of a recipe that comes with Papilio
        host: hardware profile of the nodes, or a file of `papilio calibrate`: what to ask for, and what to plan for
        nproc: ranks on each node (default: one for each GPU of the host profile, or 2)
        nnodes: number of nodes
        wait_s: seconds that nodes may come later than the first one
        name: name of the job
        python: interpreter that runs the job (default: the image's python3, or the one that runs this command)
        image: container image, for kubernetes; its python3 runs the job
        cpu: cores to ask for on each node (default: the host profile's, or one for each thread of the ranks)
        gpu: GPUs to ask for on each node (default: with a GPU host profile one for each rank, else none)
        memory_mb: memory to ask for on each node, in MB (default: nine tenths of the host profile's, or 4096)
        env: variables for the job, NAME=VALUE,NAME=VALUE; a value may have commas
        mounts: storage, as type=volume,src=CLAIM,dst=FOLDER or type=bind,src=FOLDER,dst=FOLDER[,readonly]
        omp_threads: threads of each rank inside a CPU operator
        rdzv_port: port on the first node where the nodes meet; unused with one node
    """
    asked = hosts.request_host(host, nproc=nproc, cpu=cpu, gpu=gpu, memory_mb=memory_mb, omp_threads=omp_threads)
    command = roles.preflight_command(recipe, overrides, asked, nnodes, wait_s)
    around = ExecutionEnvironment(python, image, env, mounts, omp_threads, 0)
    return roles.make_app(name, "preflight", command, asked, around, str(nnodes), rdzv_port)
