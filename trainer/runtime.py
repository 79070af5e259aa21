"""Settings of the process that make CPU ranks fast; none changes a result but for denormal numbers."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import warnings

import torch

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_THRESHOLD = -3
MAX_MMAP_THRESHOLD_BYTES = 32 << 20  # the most that glibc takes
KEPT_BYTES = 1 << 30
TOP_PAD_BYTES = 64 << 20


def configure_runtime() -> None:
    """Configure logging, arithmetic and memory of this process; call once, before anything large is allocated."""
    # Warnings of libraries stay; their notices at start-up, which repeat on every rank, do not.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_flush_denormal(True)
    _keep_freed_memory()
    # Huge pages for tables (read by PyTorch's allocator at its first large allocation): random rows miss the TLB less.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _keep_freed_memory() -> None:
    """Let glibc keep the activations' memory between steps, instead of returning it and faulting it in again."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from other C libraries, such as musl
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_TOP_PAD, TOP_PAD_BYTES)
