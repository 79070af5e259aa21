"""How much memory this process may use: what a scheduler gave it (a cgroup's limit), where that is less than there is.

A container or a Slurm job sees the whole memory of its host in the usual places, and is killed for using more than
was given to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def memory_limit_bytes(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int | None:
    """Return the least limit of this process's cgroup and those around it; None where there is none.

    Args:
        root: where cgroups are mounted (version 2, or version 1 with its controller `memory`).
        own: the kernel's list of the cgroups that this process is in.
    """
    try:
        lines = own.read_text("utf-8").splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            limits += list(_limits(root, path, "memory.max"))
        elif "memory" in controllers.split(","):
            limits += list(_limits(root / "memory", path, "memory.limit_in_bytes"))
    return min(limits, default=None)


def _limits(mount: Path, path: str, name: str) -> Iterator[int]:
    """Read the limits from the mount down to the process's own cgroup; in a container there may be the first only."""
    folder = mount
    for part in ["", *path.strip("/").split("/")]:
        folder = folder / part
        try:
            text = (folder / name).read_text("utf-8").strip()
        except OSError:
            continue
        if text.isdigit():  # else "max"; version 1 writes a huge number instead
            yield int(text)
