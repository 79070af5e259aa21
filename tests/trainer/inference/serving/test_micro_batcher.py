"""The queue in front of the model, driven step by step: model and clock stand still until the test lets them go on."""

import asyncio
import queue
import time
from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
import pytest
import torch

from papilio.data_pipeline.id_mapper import IdMapper
from papilio.data_pipeline.schema import CategoricalColumn, DenseColumn, Schema
from papilio.trainer.inference.encoding.request_encoder import RequestEncoder
from papilio.trainer.inference.scorer import Scorer
from papilio.trainer.inference.serving import micro_batcher
from papilio.trainer.inference.serving.metrics import LATENCY_BOUNDS_S, Metrics, make_shared_cells, percentiles
from papilio.trainer.inference.serving.micro_batcher import MicroBatcher, OverloadError, RecordError
from papilio.trainer.inference.serving.serve_options import ServeOptions

COLUMN = CategoricalColumn(name="c", kind="integer", encoding="identity", num_buckets=100)
SCHEMA = Schema(dense=(DenseColumn(name="x", transform="identity"),), categorical=(COLUMN,))


class SteppedModel:
    """Answers x / 100, one batch for each call of `step`; notes the sizes of batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.begun: queue.Queue[int] = queue.Queue()
        self._steps: queue.Queue[None] = queue.Queue()
        self.scorer = Scorer(None, RequestEncoder(SCHEMA, {"c": IdMapper(COLUMN, None)}), self.predict)

    def predict(self, dense: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        self.begun.put(len(dense))
        self._steps.get(timeout=30)
        self.sizes.append(len(dense))
        if (dense == 13).any():
            raise RuntimeError("13 brings bad luck")
        return (dense[:, 0] / 100).masked_fill(dense[:, 0] > 1e38, float("nan"))  # as a model overflows

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self._steps.put(None)

    async def wait_until_busy(self) -> int:
        return await asyncio.to_thread(self.begun.get, timeout=30)


class Clock:
    """What the batcher takes for the module `time`: it goes on when a test says so, however busy the machine is."""

    perf_counter = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.now_s = 1e3

    def monotonic(self) -> float:
        return self.now_s


def records(*values: float) -> list[dict[str, object]]:
    return [{"x": value, "c": 5} for value in values]


def drive(model: SteppedModel, steps, clock: object = None, **options: object) -> None:
    """Run the coroutine `steps(batcher)` beside a batcher with these options; `clock` may be the module `time`."""

    async def run() -> None:
        settings = ServeOptions(package="none", **options)
        batcher = MicroBatcher(model.scorer, settings, Metrics())
        try:
            async with asyncio.timeout(120):
                await steps(batcher)
        finally:
            model.step(1000)
            await asyncio.to_thread(batcher.close)

    with nullcontext() if clock is time else patch.object(micro_batcher, "time", clock or Clock()):
        asyncio.run(run())


def test_what_comes_while_the_model_is_busy_is_scored_together() -> None:
    model = SteppedModel()

    async def steps(batcher: MicroBatcher) -> None:
        first = batcher.submit(records(1), 1)
        assert await model.wait_until_busy() == 1
        others = [batcher.submit(records(*values), len(values)) for values in ([2, 3], [4], [], [5, 6, 7])]
        model.step(2)
        assert (await first).tolist() == pytest.approx([0.01])
        answers = [(await other).tolist() for other in others]
        assert answers == [pytest.approx(a) for a in ([0.02, 0.03], [0.04], [], [0.05, 0.06, 0.07])]
        assert model.sizes == [1, 6]

    drive(model, steps)


def test_batches_are_bounded_but_a_larger_request_is_scored_whole() -> None:
    model = SteppedModel()

    async def steps(batcher: MicroBatcher) -> None:
        first = batcher.submit(records(1), 1)
        await model.wait_until_busy()
        sizes = (2, 2, 1, 9, 1)
        others = [batcher.submit(records(*range(size)), size) for size in sizes]
        model.step(20)
        await asyncio.gather(first, *others)
        assert model.sizes == [1, 4, 1, 9, 1]

    drive(model, steps, max_batch=4)


def test_a_full_queue_refuses_at_once_and_takes_again_when_it_has_room() -> None:
    model = SteppedModel()

    async def steps(batcher: MicroBatcher) -> None:
        batcher.submit(records(1), 1)
        await model.wait_until_busy()
        kept = [batcher.submit(records(2, 3), 2), batcher.submit(records(4, 5), 2)]
        with pytest.raises(OverloadError, match="4 records wait already, 5 may; try again later"):
            batcher.submit(records(6, 7), 2)
        kept.append(batcher.submit(records(6), 1))
        model.step(10)
        assert [len(await answer) for answer in kept] == [2, 2, 1]
        assert (await batcher.submit(records(8, 9), 2)).tolist() == pytest.approx([0.08, 0.09])

    drive(model, steps, max_queue=5, max_batch=5)


def test_who_waited_too_long_is_refused_and_costs_no_scoring() -> None:
    model, clock = SteppedModel(), Clock()

    async def steps(batcher: MicroBatcher) -> None:
        first = batcher.submit(records(1), 1)
        await model.wait_until_busy()
        late = batcher.submit(records(2, 3), 2)
        clock.now_s += 0.021
        model.step()
        await first
        with pytest.raises(OverloadError, match="waited 20 ms; try again later"):
            await late
        model.step()
        assert len(await batcher.submit(records(4), 1)) == 1
        assert model.sizes == [1, 1]

    drive(model, steps, clock, max_delay_ms=20)


def test_who_would_wait_too_long_is_refused_at_once() -> None:
    model, clock = SteppedModel(), Clock()

    async def steps(batcher: MicroBatcher) -> None:
        slow = batcher.submit(records(1), 1)
        await model.wait_until_busy()
        clock.now_s += 0.3  # a record is taken to need 30 ms from now on: a tenth of the newest
        model.step()
        await slow
        running = batcher.submit(records(2), 1)
        await model.wait_until_busy()
        queued = [batcher.submit(records(3, 4), 2), batcher.submit(records(5, 6), 2)]
        with pytest.raises(OverloadError, match=r"^120 ms of work wait already; try again later$"):
            batcher.submit(records(7), 1)
        with pytest.raises(OverloadError, match=r"^120 ms of work wait already"):
            batcher.require_room()
        model.step(10)
        await asyncio.gather(running, *queued, return_exceptions=True)

    drive(model, steps, clock, max_delay_ms=100)


def test_a_first_request_waits_for_others_until_the_batch_is_full() -> None:
    model = SteppedModel()

    async def steps(batcher: MicroBatcher) -> None:
        model.step(2)
        answers = [batcher.submit(records(i), 1) for i in range(3)]
        await asyncio.gather(*answers)
        assert model.sizes == [3]
        begin_s = time.monotonic()
        await batcher.submit(records(1), 1)
        # It does wait; a bound from below is no measurement of speed.
        assert time.monotonic() - begin_s >= 1

    drive(model, steps, time, max_wait_ms=1_000, max_batch=3, max_delay_ms=60_000)


def test_faults_are_numbered_within_their_request() -> None:
    model = SteppedModel()

    async def steps(batcher: MicroBatcher) -> None:
        batcher.submit(records(1), 1)
        await model.wait_until_busy()
        sound, broken = batcher.submit(records(1, 2), 2), batcher.submit([*records(1), {"x": 1, "c": "z"}], 2)
        infinite = batcher.submit(records(1, 2, 3e38), 3)
        model.step(5)
        assert len(await sound) == 2
        with pytest.raises(RecordError, match="record 1, column c: 'z' is not a whole number of 64 bits") as error:
            await broken
        assert (error.value.record, error.value.column) == (1, "c")
        with pytest.raises(RecordError, match="record 2: its score is not a finite number"):
            await infinite

    drive(model, steps)


def test_a_request_that_the_model_fails_at_fails_alone() -> None:
    model = SteppedModel()

    async def steps(batcher: MicroBatcher) -> None:
        batcher.submit(records(1), 1)
        await model.wait_until_busy()
        answers = [batcher.submit(records(value), 1) for value in (12, 13, 14)]
        model.step(10)
        found = await asyncio.gather(*answers, return_exceptions=True)
        assert [str(outcome) if isinstance(outcome, Exception) else float(outcome[0]) for outcome in found] == [
            pytest.approx(0.12),
            "13 brings bad luck",
            pytest.approx(0.14),
        ]
        assert batcher.is_alive

    drive(model, steps)


def test_requests_of_before_a_swap_are_answered_by_the_package_of_before() -> None:
    old, new = SteppedModel(), SteppedModel()

    async def steps(batcher: MicroBatcher) -> None:
        batcher.submit(records(1), 1)
        await old.wait_until_busy()
        before = batcher.submit(records(2), 1)
        batcher.scorer = new.scorer
        after = batcher.submit(records(3), 1)
        old.step(2)
        new.step(1)
        await asyncio.gather(before, after)
        assert (old.sizes, new.sizes) == ([1, 1], [1])

    drive(old, steps)


def test_a_batch_that_does_not_end_is_noticed_and_nobody_waits_for_it() -> None:
    model, clock = SteppedModel(), Clock()

    async def steps(batcher: MicroBatcher) -> None:
        assert not batcher.is_stalled
        held = batcher.submit(records(1), 1)
        await model.wait_until_busy()
        waiting = batcher.submit(records(2), 1)
        clock.now_s += 5
        assert not batcher.is_stalled
        assert not batcher.refuse_if_stalled()
        clock.now_s += 0.1
        assert batcher.is_stalled
        assert batcher.refuse_if_stalled()
        for answer in (held, waiting):
            with pytest.raises(
                OverloadError, match=r"^one batch is being scored for more than 5 s; ask another server$"
            ):
                await answer
        with pytest.raises(OverloadError, match="one batch is being scored"):
            batcher.submit(records(3), 1)
        model.step(10)
        while batcher.is_stalled:
            await asyncio.sleep(0.005)
        assert (await batcher.submit(records(4), 1)).tolist() == pytest.approx([0.04])
        assert model.sizes == [1, 1]

    drive(model, steps, clock, stall_timeout_s=5)


def test_the_bytes_that_wait_are_bounded_and_so_are_those_of_a_batch() -> None:
    model = SteppedModel()
    most = 16 * 16 * 2**20  # 16 requests of 16 times the default --max-body-bytes

    async def steps(batcher: MicroBatcher) -> None:
        first = batcher.submit(records(1), 1)
        await model.wait_until_busy()
        others = [batcher.submit(records(20), 1, most // 16) for _ in range(16)]
        with pytest.raises(OverloadError, match=f"requests of {most:,} bytes wait already; try again later"):
            batcher.submit(records(2), 1, 1)
        model.step(20)
        await asyncio.gather(first, *others)
        assert model.sizes == [1] * 17
        assert len(await batcher.submit(records(3), 1, most)) == 1

    drive(model, steps, max_delay_ms=60_000)


def test_processes_add_up_their_figures() -> None:
    cells = make_shared_cells(3)
    each = [Metrics(cells, process) for process in range(3)]
    for process, metrics in enumerate(each):
        metrics.clear_gauges()
        metrics.set_gauge("is_ready", 1)
        for _ in range(process + 1):
            metrics.record_request("json", 200, 0.01)
    assert [metrics.num_answered() for metrics in each] == [1, 2, 3]
    for metrics in each:
        lines = metrics.text({"name": 'a"b'}).splitlines()
        assert 'papilio_requests_total{format="json",status="200"} 6' in lines
        assert "papilio_ready_processes 3" in lines
        assert 'papilio_package_info{name="a\\"b"} 1' in lines
    Metrics(cells, 1).clear_gauges()
    assert [each[0].is_ready(process) for process in range(3)] == [True, False, True]


@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_percentiles_are_those_of_the_values_to_five_percent(spread) -> None:
    values = np.exp(np.random.default_rng(0).normal(np.log(0.004), spread, 50_000))
    counts = np.bincount(np.searchsorted(LATENCY_BOUNDS_S, values), minlength=len(LATENCY_BOUNDS_S) + 1)
    for quantile, seconds in percentiles(counts.astype(float)).items():
        assert seconds == pytest.approx(np.quantile(values, quantile), rel=0.05)
    assert percentiles(np.zeros(len(LATENCY_BOUNDS_S) + 1)) == {}


def test_the_window_of_percentiles_forgets() -> None:
    metrics = Metrics()
    for _ in range(100):
        metrics.record_request("json", 200, 1.0)
    for _ in range(7):
        metrics.step_window()
    assert metrics.latency_percentiles() == {}
    metrics.record_request("json", 200, 0.01)
    assert metrics.latency_percentiles()[0.5] == pytest.approx(0.01, rel=0.1)
