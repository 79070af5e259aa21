"""One serving process: uvicorn around the application, packages swapped on SIGHUP, nobody cut off on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType

import torch
import uvicorn

from papilio.trainer.inference.package.format import PackageError
from papilio.trainer.inference.package.sample_check import load_checked_scorer
from papilio.trainer.inference.scorer import Scorer
from papilio.trainer.inference.serving.app import ServingApp
from papilio.trainer.inference.serving.connections import (
    Acceptor,
    BoundedProtocol,
    ConnectionLimits,
    possible_connections,
)
from papilio.trainer.inference.serving.http_messages import one_line
from papilio.trainer.inference.serving.metrics import WINDOW_STEP_S, Metrics
from papilio.trainer.inference.serving.micro_batcher import MicroBatcher
from papilio.trainer.inference.serving.package_swap import PackageSwap, formats_of
from papilio.trainer.inference.serving.serve_options import OTHER_PORT, ServeError, ServeOptions

logger = logging.getLogger(__name__)
# Longer than the idle time of common load balancers and clients, so that it is they who close idle connections.
KEEP_ALIVE_S = 75
# More than a handshake takes over any network.
HALF_OPEN_S = 0.2
# A client that has just connected sends its first request within this time, or finds its connection closed.
FIRST_REQUEST_S = 2.0
_DRAIN_CHECK_S = 0.02
# Ticks of the watch over the scoring thread.
_STALL_CHECK_S = 1.0
# Under overload the thread that answers HTTP never rests, and the one that scores, which gives up the interpreter's
# lock in every operator, would wait Python's default of 5 ms to get it back each time.
GIL_SWITCH_S = 2e-4


class _Server(uvicorn.Server):
    """uvicorn's server, which drains before it shuts down.

    uvicorn closes idle connections as soon as it is told to end, under the hands of clients that are just sending.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        app: ServingApp,
        listener: socket.socket,
        drain_s: float,
        on_started: Callable[[], None],
        *,
        is_shared: bool = False,
    ) -> None:
        super().__init__(config)
        self._app, self._listener, self._drain_s, self._is_shared = app, listener, drain_s, is_shared
        self._on_started = on_started
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup([])
        self._acceptor = Acceptor(self._listener, self._make_protocol)
        try:
            self._acceptor.start()
        except OSError as error:
            raise ServeError(f"cannot listen on {address_of(self._listener)}: {error.strerror}; {OTHER_PORT}") from None
        self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal; a second SIGINT ends at once."""
        if self._drain is None:
            logger.info("%s: no new connections after %g s", signal.Signals(sig).name, self._drain_s)
            self.begin_drain()
        elif sig == signal.SIGINT:
            self.should_exit = self.force_exit = True

    def begin_drain(self) -> None:
        """Answer on for a while, each answer the last of its connection; then close the port and shut down."""
        if self._drain is None:
            self._app.is_draining = True
            self._drain = asyncio.get_running_loop().create_task(self._run_drain())

    async def _run_drain(self) -> None:
        await asyncio.sleep(self._drain_s)
        await self._acceptor.stop(HALF_OPEN_S, is_shared=self._is_shared)
        # uvicorn closes connections without a request: of those that were accepted last, one may be under way.
        while any(each.awaits_first_request(FIRST_REQUEST_S) for each in self.server_state.connections):  # type: ignore[union-attr]
            await asyncio.sleep(_DRAIN_CHECK_S)
        self.should_exit = True

    def _make_protocol(self) -> asyncio.Protocol:
        protocol = self.config.http_protocol_class
        return protocol(config=self.config, server_state=self.server_state, app_state={})  # type: ignore[call-arg]


def serve(options: ServeOptions, listener: socket.socket, metrics: Metrics, parent: int | None = None) -> int:
    """Load the package and answer requests until told to end; return the exit status.

    Args:
        options: of the whole server.
        listener: bound, but not listening yet: until the package is loaded, connections are refused.
        metrics: of this process.
        parent: a pipe whose closing says that the process which started this one has gone.

    Raises:
        PackageError: the package cannot be served.
        ServeError: another process listens on the port by now.
    """
    metrics.clear_gauges()
    # It logs a line for each client that sends no HTTP, at any rate that this client likes.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    torch.set_num_threads(options.threads)
    sys.setswitchinterval(GIL_SWITCH_S)
    scorer = _load(options)
    config = uvicorn.Config(
        "set below, when there is an event loop",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(options.stop_timeout_s)),
    )
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_run(config, scorer, options, listener, metrics, parent))
    _log_summary(metrics)
    return 0


def _load(options: ServeOptions) -> Scorer:
    try:
        return load_checked_scorer(options.package, formats=formats_of(options))
    except PackageError:
        raise
    except Exception as error:  # whatever a damaged file makes its reader raise
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ServeError(
            f"{options.package} cannot be served: {reason}; `papilio package verify` looks at it"
        ) from None


async def _run(
    config: uvicorn.Config,
    scorer: Scorer,
    options: ServeOptions,
    listener: socket.socket,
    metrics: Metrics,
    parent: int | None,
) -> None:
    batcher = MicroBatcher(scorer, options, metrics)
    config.app = app = ServingApp(batcher, options, metrics)
    limits = ConnectionLimits(
        options,
        possible_connections(options.max_connections),
        on_refused=lambda status: metrics.record_request("other", status, 0),
    )
    config.http = partial(BoundedProtocol, limits)  # type: ignore[assignment]

    def on_started() -> None:
        metrics.set_gauge("is_ready", 1)
        place = f"{address_of(listener)} by process {os.getpid()}"
        logger.info("%s (%s) is served on %s", scorer.label, scorer.form, place)

    server = _Server(config, app, listener, options.drain_s, on_started, is_shared=parent is not None)
    tasks = _begin_tasks(options, batcher, metrics)
    if parent is not None:
        asyncio.get_running_loop().add_reader(parent, _on_orphaned, server, parent)
    await server.serve([listener])
    metrics.set_gauge("is_ready", 0)
    for task in tasks:
        task.cancel()
    batcher.close()


def address_of(listener: socket.socket) -> str:
    """Return the URL that a bound socket answers at."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _begin_tasks(options: ServeOptions, batcher: MicroBatcher, metrics: Metrics) -> list[asyncio.Task[None]]:
    loop = asyncio.get_running_loop()
    swap = PackageSwap(options, batcher, metrics)
    swaps: set[asyncio.Task[bool]] = set()

    def on_hangup() -> None:
        task = loop.create_task(swap.swap())
        swaps.add(task)
        task.add_done_callback(swaps.discard)

    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    tasks = [loop.create_task(_step_window(metrics)), loop.create_task(_watch_scoring(batcher))]
    if options.watch_s is not None:
        tasks.append(loop.create_task(swap.watch(options.watch_s)))
    return tasks


async def _step_window(metrics: Metrics) -> None:
    while True:
        await asyncio.sleep(WINDOW_STEP_S)
        metrics.step_window()


async def _watch_scoring(batcher: MicroBatcher) -> None:
    was_stalled = False
    while True:
        await asyncio.sleep(_STALL_CHECK_S)
        is_stalled = batcher.refuse_if_stalled()
        if is_stalled and not was_stalled:
            logger.error("the scoring thread does not get on with a batch: /healthz says 503, requests are refused")
        was_stalled = is_stalled


def _on_orphaned(server: _Server, parent: int) -> None:
    asyncio.get_running_loop().remove_reader(parent)
    server.begin_drain()


def _log_summary(metrics: Metrics) -> None:
    found = metrics.latency_percentiles()
    shown = ", ".join(f"p{quantile * 100:g} {seconds * 1e3:.2f} ms" for quantile, seconds in found.items())
    logger.info("stopped after %s answers%s", f"{metrics.num_answered():,}", f"; last minute: {shown}" * bool(found))
