"""What each host runs first: `python -m papilio.launch.start [options] -- MODULE [arguments]`; it becomes that module.

Schedulers lose things on the way: TorchX's Slurm cuts the value of a variable at its first comma, its Slurm and
local_cwd ignore mounts, and none but some say which host is the first. Here what is carried another way is put in its
place, and what is missing ends the job, before any rank starts. So do checks that the job wants to come first, a
preflight of all its hosts: they are another module, which meets where the job will.
"""

from __future__ import annotations

import argparse
import base64
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from papilio.trainer.elastic.bootstrap import child_command, module_command
from papilio.trainer.elastic.exit_codes import NO_RESTART_EXIT_CODE

MOUNTS = "/proc/self/mountinfo"


class StartError(ValueError):
    """The host is not as the job needs it; the message says what is missing and how to fix it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, set the environment, and become the module; returns only if something is missing."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--")
    parser = argparse.ArgumentParser(prog="papilio.launch.start", description=__doc__, allow_abbrev=False)
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--mounted", action="append", default=[], metavar="FOLDER")
    parser.add_argument("--head-node-in", metavar="NAME", help="variable that names the first host")
    parser.add_argument("--rdzv-port", type=int, metavar="N", help="port on the first host where the hosts meet")
    parser.add_argument("--checks", default="", metavar="COMMAND", help="module with arguments that must succeed first")
    parser.add_argument("--dollar", metavar="MARK", help="what stands for $ in all words")
    parser.add_argument("--file", action="append", default=[], metavar="PATH:BASE64", help="a file that comes along")
    options = parser.parse_args(words[:end])
    if options.dollar is not None:
        words = [word if word.startswith("--dollar=") else word.replace(options.dollar, "$") for word in words]
        options = parser.parse_args(words[:end])
    there = write_files(options.file)
    module, *rest = (with_files(word, there) for word in words[end + 1 :])
    checks = [with_files(word, there) for word in shlex.split(options.checks)]
    endpoint = []
    try:
        check_mounts(options.mounted, Path(MOUNTS).read_text("utf-8") if options.mounted else "")
        if options.head_node_in is not None:
            endpoint = [f"--rdzv-endpoint={head_node(options.head_node_in, os.environ)}:{options.rdzv_port}"]
    except StartError as error:
        print(f"papilio: error: {error}", file=sys.stderr, flush=True)
        return NO_RESTART_EXIT_CODE
    os.environ.update(word.split("=", 1) for word in options.env)
    status = run_module([*checks, *endpoint]) if checks else 0
    if status:
        why = "the checks before the job failed, the log of host 0 says why; nothing was started"
        print(f"papilio: error: {why}", file=sys.stderr, flush=True)
        return status
    return os.execv(sys.executable, module_command(module, *endpoint, *rest))


def write_files(files: Iterable[str]) -> dict[str, str]:
    """Write the files that came in the command; return where each is now, by its path where the job was submitted."""
    there: dict[str, str] = {}
    for text in files:
        path, _, content = text.rpartition(":")
        target = Path(tempfile.mkdtemp(prefix="papilio_")) / Path(path).name
        target.write_bytes(base64.b64decode(content))
        there[path] = str(target)
    return there


def with_files(word: str, there: Mapping[str, str]) -> str:
    """Name a file that came along by where it is here, as a word or as the value of an option."""
    option, _, value = word.partition("=")
    if option.startswith("-") and value in there:
        return f"{option}={there[value]}"
    return there.get(word, word)


def run_module(words: Sequence[str]) -> int:
    """Run a module to its end and return its status; it ends with this process, if that is told to."""
    process = subprocess.Popen(child_command(*words))
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    status = process.wait()
    signal.signal(signal.SIGTERM, before)
    return status if status >= 0 else 128 - status


def head_node(variable: str, environment: Mapping[str, str]) -> str:
    """Return the host in this variable.

    TorchX's own component falls back to localhost, where every host trains alone, each believing it is the whole job.

    Raises:
        StartError: the variable is empty.
    """
    host = environment.get(variable, "")
    if not host:
        raise StartError(
            f"the scheduler did not say which host is the first node: the variable {variable} is empty here, so the "
            "nodes cannot find each other. Run on one node (--nnodes 1), use a scheduler that sets it, or export "
            f"{variable}=HOST on every node"
        )
    return host


def check_mounts(folders: Iterable[str], mountinfo: str) -> None:
    """Check that something is mounted on each of these folders; `mountinfo` is the text of /proc/self/mountinfo.

    Raises:
        StartError: nothing is.
    """
    mounted = {line.split(" ")[4].encode().decode("unicode_escape") for line in mountinfo.splitlines()}
    for folder in folders:
        if os.path.normpath(folder) not in mounted:
            raise StartError(
                f"nothing is mounted on {folder}, though the job asks for it (--mounts): the schedulers local_cwd and "
                "slurm mount nothing, kubernetes does. There, leave --mounts out and use paths that the hosts have"
            )


if __name__ == "__main__":
    sys.exit(main())
