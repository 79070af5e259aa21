"""Settings of the process that make CPU ranks fast; none changes a result but for denormal numbers."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.profiler import record_function

from papilio.trainer.compat.torch_internals import is_profiling

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_THRESHOLD = -3
MAX_MMAP_THRESHOLD_BYTES = 32 << 20  # the most that glibc takes
KEPT_BYTES = 1 << 30
TOP_PAD_BYTES = 64 << 20


def configure_runtime() -> None:
    """Configure arithmetic and memory of this process; call once, before anything large is allocated."""
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_flush_denormal(True)
    _keep_freed_memory()
    _skip_idle_annotations()
    # Huge pages for tables (read by PyTorch's allocator at its first large allocation): random rows miss the TLB less.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector, which looks through a million objects of the libraries, out of the steps.

    Steps leave no cycles behind (tests/trainer/test_runtime.py); what does is collected at the end.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _keep_freed_memory() -> None:
    """Let glibc keep the activations' memory between steps, instead of returning it and faulting it in again."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from other C libraries, such as musl
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_TOP_PAD, TOP_PAD_BYTES)


def _skip_idle_annotations() -> None:
    """Make `record_function`, of which TorchRec enters some 70 a step, cost nothing unless a profiler runs.

    Worth 6 % of a CPU step (Kaggle-like DLRM, 2 ranks, 2026-11-21).
    """
    enter, leave = record_function.__enter__, record_function.__exit__
    entered: weakref.WeakSet[record_function] = weakref.WeakSet()

    def enter_if_profiled(self: record_function) -> record_function:
        if is_profiling():
            entered.add(self)
            return enter(self)  # type: ignore[no-any-return,no-untyped-call]
        return self

    def leave_if_entered(self: record_function, *exception: Any) -> None:
        if self in entered:
            entered.discard(self)
            leave(self, *exception)

    setattr(record_function, "__enter__", enter_if_profiled)  # noqa: B010  # mypy forbids plain assignment
    setattr(record_function, "__exit__", leave_if_entered)  # noqa: B010
