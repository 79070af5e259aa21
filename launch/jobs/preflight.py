"""`papilio preflight`: asks the hosts of a job whether it would run: here, on a scheduler, or on hosts by hand."""

from __future__ import annotations

import argparse
import os
import subprocess
import time

from papilio.data_pipeline.terminal import table_columns
from papilio.launch.host_request import MAX_HOSTS, MAX_PORT, MAX_RANKS, MAX_WAIT_S, request_host, require_number
from papilio.launch.jobs.local import count_gpus
from papilio.launch.usage import UsageError, require_files
from papilio.trainer.config_file import load_config
from papilio.trainer.elastic.bootstrap import child_command

# The hosts of a preflight on this machine are processes: they are there at once, or not at all.
LOCAL_WAIT_S = 30.0
MAX_HOSTS_HERE = 64
MAX_READ_GIB = 1 << 20


def run_preflight(namespace: argparse.Namespace) -> int:
    """Print the table; 0 when nothing failed, else 1."""
    if namespace.recipe.endswith(".toml"):
        require_files("--recipe", [namespace.recipe])
    _check_numbers(namespace)
    load_config(namespace.recipe, namespace.overrides)
    if namespace.scheduler not in (None, "local_cwd"):
        return _submit(namespace)
    nproc = request_host(namespace.host, nproc=namespace.nproc or (None if namespace.host else count_gpus() or None))
    return _run_workers(namespace, nproc.nproc)


def _check_numbers(namespace: argparse.Namespace) -> None:
    """Check every number of the command line, before a process starts or a job waits in a queue.

    Raises:
        UsageError: one is too small or too large.
    """
    is_here = namespace.scheduler in (None, "local_cwd") and namespace.rdzv_endpoint is None
    require_number("--nnodes", namespace.nnodes, 1, MAX_HOSTS_HERE if is_here else MAX_HOSTS)
    for flag, value, least, most in (
        ("--nproc", namespace.nproc, 1, MAX_RANKS),
        ("--index", None if namespace.rdzv_endpoint is None else namespace.index, 0, namespace.nnodes - 1),
        ("--rdzv-port", namespace.rdzv_port, 1, MAX_PORT),
        ("--data-port", namespace.data_port, 1, MAX_PORT),
        ("--wait-s", namespace.wait_s, 1, MAX_WAIT_S),
        ("--read-gib", namespace.read_gib, 0, MAX_READ_GIB),
    ):
        if value is not None:
            require_number(flag, value, least, most)


def _run_workers(namespace: argparse.Namespace, nproc: int) -> int:
    """Start the workers of all hosts here, or of this host where the hosts meet elsewhere; the first one prints."""
    words = ["--recipe", namespace.recipe, "--nnodes", str(namespace.nnodes), "--nproc", str(nproc)]
    words += ["--host", namespace.host] if namespace.host else []
    words += [*_flags(namespace), *namespace.overrides]
    if namespace.rdzv_endpoint is not None:
        words += ["--rdzv-endpoint", namespace.rdzv_endpoint, "--job", f"hand-{namespace.rdzv_endpoint}"]
        words += ["--index", str(namespace.index)] if namespace.index is not None else []
        words += ["--wait-s", f"{namespace.wait_s:g}"] if namespace.wait_s is not None else []
        return subprocess.run([*_worker(), *words], check=False).returncode
    from papilio.launch.preflight.wire import free_port

    words += [
        "--rdzv-endpoint",
        f"127.0.0.1:{namespace.rdzv_port or free_port()}",
        "--job",
        f"{os.getpid()}-{time.time_ns()}",
    ]
    words += ["--wait-s", f"{namespace.wait_s if namespace.wait_s is not None else LOCAL_WAIT_S:g}"]
    others = [
        subprocess.Popen([*_worker(), *words, "--index", str(index)], stdout=subprocess.DEVNULL)
        for index in range(1, namespace.nnodes)
    ]
    try:
        status = subprocess.run([*_worker(), *words, "--index", "0"], check=False).returncode
    finally:
        for other in others:
            other.terminate()
            other.wait()
    return status


def _submit(namespace: argparse.Namespace) -> int:
    """Run the component on a scheduler and show what its hosts print."""
    from papilio.launch.jobs.scheduled import run_launch

    if namespace.rdzv_endpoint is not None or namespace.index is not None:
        raise UsageError(
            f"--rdzv-endpoint and --index are for hosts without a scheduler; leave out -s {namespace.scheduler}"
        )
    words = ["--recipe", namespace.recipe, "--nnodes", str(namespace.nnodes)]
    words += ["--env", f"COLUMNS={table_columns()}"]
    given = {"host": namespace.host, "nproc": namespace.nproc, "wait_s": namespace.wait_s}
    given["rdzv_port"] = namespace.rdzv_port
    words += [word for flag, value in given.items() if value is not None for word in (f"--{flag}", str(value))]
    arguments = [*words, "--", *_flags(namespace), *namespace.overrides]
    return run_launch(
        argparse.Namespace(
            component="preflight",
            arguments=arguments,
            scheduler=namespace.scheduler,
            cfg=namespace.cfg,
            dryrun=False,
            follow=True,
        )
    )


def _flags(namespace: argparse.Namespace) -> list[str]:
    """Return what is said to the worker as it was said to the command."""
    flags = [*(["--json"] if namespace.json else []), *([] if namespace.links else ["--no-links"])]
    flags += [f"--read-gib={namespace.read_gib:g}"] if namespace.read_gib is not None else []
    return [*flags, *([f"--data-port={namespace.data_port}"] if namespace.data_port is not None else [])]


def _worker() -> list[str]:
    return child_command("papilio.launch.preflight.worker")
