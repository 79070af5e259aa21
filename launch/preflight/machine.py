"""What this host gives the job: cores and memory, of which a container or a scheduler may allow less than there is."""

from __future__ import annotations

import os

from papilio.trainer.elastic.memory_limit import memory_limit_bytes


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_bytes() -> int:
    """Return the host's memory, or what this process may use of it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit_bytes()
    return physical if limit is None else min(physical, limit)


def shared_memory_bytes() -> int:
    """Return the size of /dev/shm, 0 where there is none."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return found.f_blocks * found.f_frsize
