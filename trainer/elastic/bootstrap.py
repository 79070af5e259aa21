"""Starts a module of Papilio as `python -m` does, but from where Papilio is installed, and bound to its parent.

    python .../trainer/bootstrap.py [--parent=PID:SIGNAL] -m MODULE [arguments]

Started by its file, Python puts neither the working directory nor anything else on sys.path before the standard
library: `python -m papilio.trainer.elastic.agent` would import whatever `random.py` or `torch.py` lies there.
Entries of PYTHONPATH come last, so that they add modules but never replace installed ones.

With --parent the process gets SIGNAL when the process PID is gone, from its first moment to its last: the kernel sees
to it (PR_SET_PDEATHSIG), also while no Python code runs. No other module of ours is imported at its top.
"""

# ruff: noqa: E402
from __future__ import annotations

# What `signal` is made of, but loaded already: importing that takes a moment, in which Ctrl-C may come.
import _signal  # type: ignore[import-not-found]

HEARS_CTRL_C = _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler  # not so in a shell's background
if __name__ == "__main__" and HEARS_CTRL_C:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # until main can end without a traceback

import os
import pwd
import runpy
import signal
import sys
import sysconfig
from collections.abc import Sequence

FILE = os.path.abspath(__file__)
HOME = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(FILE))))
PARENT = "--parent="
# What prints into the log of a job, besides its ranks: there the traceback of an error that nobody foresaw belongs.
LOGGED = ("papilio.trainer.elastic.agent", "papilio.launch.start", "papilio.launch.schedulers.local.supervisor")
PR_SET_PDEATHSIG = 1  # sys/prctl.h


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command that starts a module which may outlive this process, or is to take its place."""
    return [sys.executable, FILE, "-m", module, *arguments]


def child_command(module: str, *arguments: str) -> list[str]:
    """Return the command that starts a module as a child: it gets SIGTERM when this process is gone."""
    return bound(module_command(module, *arguments))


def bound(command: Sequence[str], number: signal.Signals = signal.SIGTERM) -> list[str]:
    """Bind a command to this process: what it starts gets the signal when this process is gone.

    The command must be started by the main thread: the kernel watches the thread. Commands without a bootstrap are left
    as they are.
    """
    words = list(command)
    place = next(
        (index for index, word in enumerate(words[:4]) if word in (FILE, "papilio.trainer.elastic.bootstrap")), None
    )
    if place is not None:
        words.insert(place + 1, f"{PARENT}{os.getpid()}:{int(number)}")
    return words


def prefer_installed() -> None:
    """Let nothing but the standard library stand before our home on sys.path, here and in Python's own children."""
    os.environ["PYTHONSAFEPATH"] = "1"  # of `python -c` and `python -m`: spawned workers, torch's compile workers
    order_path()


def order_path() -> None:
    """Do so in this process alone, as in TorchX's, which starts jobs of others, too. PYTHONPATH's entries go last."""
    sys.path[:] = arranged(sys.path, os.environ.get("PYTHONPATH", ""), HOME)


def name_user() -> None:
    """Give a user whom no passwd entry names, as in containers, a name and a home: libraries ask as they are imported.

    The home is Docker's; what is there to be kept needs another one.
    """
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("USER", f"uid_{os.getuid()}")
        os.environ.setdefault("HOME", "/")


def arranged(path: Sequence[str], python_path: str, home: str) -> list[str]:
    """Return sys.path with `home` before the installed packages, and what PYTHONPATH added after them."""
    own = {os.path.abspath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    added = {os.path.abspath(entry) for entry in python_path.split(os.pathsep)} - own if python_path else set()
    added -= {home}
    last = [entry for entry in path if os.path.abspath(entry) in added]
    first = [entry for entry in path if entry not in last and os.path.abspath(entry) != home]
    place = next((index for index, entry in enumerate(first) if entry.endswith("-packages")), len(first))
    return [*first[:place], home, *first[place:], *last]


def bind_to_parent(pid: int, number: int) -> None:
    """Get this signal when the process `pid`, which started this one, is gone; end if it already is."""
    import ctypes

    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    # It may have gone before. A parent that is another process, but lives, is a wrapper around the interpreter.
    if os.getppid() != pid and not _is_running(pid):
        os._exit(128 + number)


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def main() -> None:
    """Start the module that the command line names."""
    words = sys.argv[1:]
    is_child = bool(words) and words[0].startswith(PARENT)
    if is_child:
        pid, number = words.pop(0).removeprefix(PARENT).split(":")
        bind_to_parent(int(pid), int(number))
    if len(words) < 2 or words[0] != "-m":
        sys.exit(f"usage: {FILE} -m MODULE [arguments]")
    if not sys.flags.safe_path:
        del sys.path[0]  # this file's folder, or with -m the working directory
    prefer_installed()
    name_user()
    from papilio.data_pipeline.terminal import ends_quietly, make_streams_safe

    make_streams_safe()
    module, sys.argv = words[1], [FILE, *words[2:]]
    is_logged = module in LOGGED or "RANK" in os.environ
    with ends_quietly(is_child=is_child, shows_traceback=is_logged):
        if HEARS_CTRL_C:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # as a parent may have started it
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
