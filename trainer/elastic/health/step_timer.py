"""How long a rank takes for what it does by itself: its lookups, and the dense layers, which have no collectives.

Whoever is slow is seen in these times alone: a step takes equally long on all ranks, since all wait for the slowest.
A step is timed now and then (`TIMED_EVERY_S`), by hooks that are there for this step only: the others cost nothing, and
the pipeline, which replaces the forward of the sharded tables but not of the lookups inside, calls them like any step.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from papilio.sharding.compat.torchrec_internals import embedding_groups, lookups_of
from papilio.trainer.elastic.health.heartbeat import RankFigures

# Some 0.1 ms of hooks and medians each time, thus 0.03 % of a step whatever its length (benchmarks/live_view.py).
TIMED_EVERY_S = 0.25
# The medians are over so many timed steps: 5 s, or that many steps where one takes longer than TIMED_EVERY_S.
NUM_KEPT = 20
MAX_TABLES = 3
# Parts of the model (trainer/models) that compute from plain tensors; others wait for the pooled embeddings.
DENSE_PARTS = frozenset({"dense_arch", "crossnet", "over_arch"})


class Times(Protocol):
    """What a run counts of its time (trainer/run_state.py)."""

    train_s: float
    wait_s: float


class StepTimer:
    """Times one rank's work; `timed` around every step, `figures` from any thread.

    What `figures` returns are plain numbers that the step's own thread left: a thread that asked the device for them
    would wait for a kernel that hangs, which is what the watchdog is there to notice.
    """

    def __init__(self, model: nn.Module, device: torch.device, times: Times, every_s: float = TIMED_EVERY_S) -> None:
        """`model` is sharded; `times` is read when figures are asked for."""
        self._times = times
        self._every_s = every_s
        self._due_s = 0.0
        self._is_cuda = device.type == "cuda"
        self._lookups = list(_lookups(model))
        self._dense = [child for name, child in model.named_modules() if name.rpartition(".")[2] in DENSE_PARTS]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._spans: list[tuple[bool, Any, Any]] = []  # is it a lookup? from when, to when?
        self._lengths: list[tuple[nn.Module, torch.Tensor]] = []  # of the bags that a lookup read, in host memory
        self._tables: tuple[tuple[str, float], ...] = ()
        self._lookup_ms: deque[float] = deque(maxlen=NUM_KEPT)
        self._dense_ms: deque[float] = deque(maxlen=NUM_KEPT)
        self._num_timed = 0

    @contextmanager
    def timed(self, now_s: float) -> Iterator[None]:
        """Time the step in the block, which begins at `now_s` (time.perf_counter), if that is due."""
        if now_s >= self._due_s:
            self._due_s = now_s + self._every_s
            self._take_in_spans()
            for module in self._lookups:
                self._time(module, is_lookup=True)
            for module in self._dense:
                self._time(module, is_lookup=False)
        yield
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def figures(self) -> RankFigures:
        """Return the medians of the latest timed steps."""
        lookup_ms, dense_ms = tuple(self._lookup_ms), tuple(self._dense_ms)
        return RankFigures(
            train_s=self._times.train_s,
            wait_s=self._times.wait_s,
            num_timed=self._num_timed,
            lookup_ms=statistics.median(lookup_ms) if lookup_ms else None,
            dense_ms=statistics.median(dense_ms) if dense_ms else None,
            tables=self._tables,
        )

    def _time(self, module: nn.Module, *, is_lookup: bool) -> None:
        begins: list[Any] = []

        def begin(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            begins.append(self._now())

        def end(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
            if is_lookup:
                # Before the end is marked: once that is reached, the copy is there, too.
                self._lengths.append((module, self._in_host_memory(inputs[0].lengths())))
            self._spans.append((is_lookup, begins.pop(), self._now()))

        self._handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _in_host_memory(self, lengths: torch.Tensor) -> torch.Tensor:
        if not self._is_cuda:
            return lengths
        copy = torch.empty(lengths.shape, dtype=lengths.dtype, pin_memory=True)
        return copy.copy_(lengths, non_blocking=True)

    def _take_in_spans(self) -> None:
        """Add up the step timed last. A GPU that has not come to its end is not waited for: the step is left out."""
        spans, self._spans, lengths, self._lengths = self._spans, [], self._lengths, []
        if not spans or (self._is_cuda and not all(end.query() for _, _, end in spans)):
            return
        sums_ms = [0.0, 0.0]
        for is_lookup, begin, end in spans:
            sums_ms[is_lookup] += begin.elapsed_time(end) if self._is_cuda else 1e3 * (end - begin)
        self._dense_ms.append(sums_ms[False])
        self._lookup_ms.append(sums_ms[True])
        self._num_timed += 1
        self._tables = _largest_tables(lengths)


def _lookups(model: nn.Module) -> Iterator[nn.Module]:
    """Yield this rank's lookups; TorchRec keeps them out of `modules()`, those of data_parallel tables in a DDP."""
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            for lookup in lookups_of(module):
                yield lookup.module if isinstance(lookup, nn.parallel.DistributedDataParallel) else lookup


def _largest_tables(found: list[tuple[nn.Module, torch.Tensor]]) -> tuple[tuple[str, float], ...]:
    """Return the tables that a step read most bytes of, each with its share, of the bags' lengths in host memory."""
    read_bytes: Counter[str] = Counter()
    for lookup, lengths in found:
        shards = [table for bags in embedding_groups(lookup) for table in bags.config.embedding_tables]
        shards = [table for table in shards for _ in table.feature_names]
        if not shards:
            continue
        num_ids = lengths.numpy().reshape(len(shards), -1).sum(1).tolist()
        for table, count in zip(shards, num_ids, strict=True):
            read_bytes[table.name] += count * table.local_cols
    total = sum(read_bytes.values())
    return tuple((name, round(size / total, 3)) for name, size in read_bytes.most_common(MAX_TABLES) if size)
