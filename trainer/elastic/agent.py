"""One host's agent: torchrun's, with exit codes that mean something and messages in one line.

It takes the arguments of torchrun (with the c10d rendezvous) and does what it does, but:

- ranks that exit with status 75 after SIGTERM have saved: nothing failed. This host's agent exits with 75 too if it
  got the signal, or if the job needs all hosts; in an elastic job the others continue, and count no restart;
- the rank that failed first is noted where the other ranks look for it, and named before each restart;
- a rank that exits with status 78 made a mistake that it would make again: the job is not restarted, and the agents
  of all hosts exit with 78 too, so that no scheduler tries again;
- after a failure the other ranks get some seconds to report what they saw, before they are ended;
- no rank outlives it: the kernel kills them with it (trainer/elastic/bootstrap.py), from their first moment on.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, parse_args

from papilio.data_pipeline.errors import PapilioError
from papilio.data_pipeline.terminal import drop_what_has_no_room
from papilio.trainer.elastic.bootstrap import FILE, bound
from papilio.trainer.elastic.exit_codes import NO_RESTART_EXIT_CODE, RESUME_EXIT_CODE, exit_now
from papilio.trainer.elastic.health.failures import last_error
from papilio.trainer.elastic.health.health_store import HealthStore, RankFailure, host_name, open_health_store
from papilio.trainer.elastic.rendezvous import Rendezvous, open_rendezvous

# Longer than a rank looks for the cause of a lost connection (failures.WAIT_FOR_CAUSE_S).
DRAIN_TIMEOUT_S = 6.0
# What a rank that failed to end by itself gets between SIGTERM and SIGKILL.
FAILED_GRACE_S = 3.0
# For the other agents of a job that ends on all hosts, to read the reason while there is a store.
EXIT_BARRIER_TIMEOUT_S = 5.0
# How often an agent whose own ranks are well asks whether another host's made a mistake.
ASK_S = 1.0
POLL_S = 0.05
# Ranks that ran for so long have proved that they can: restarts are counted from zero again.
PROVEN_S = 3_600.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this host's part of a job; return 0, 1, 75 (resume me), 78 (do not retry), or 128 + a signal's number."""
    drop_what_has_no_room()
    # With torch's shared store an agent that joins after a loss waits for an address that nobody writes, and the
    # survivors die after 60 s (seen 2 times of 2 with torch 2.13.0).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # What torch's agent would log about its ranks is reported here in fewer words.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    parsed = parse_args(sys.argv[1:] if arguments is None else list(arguments))  # type: ignore[no-untyped-call]
    config, command, command_arguments = config_from_args(parsed)
    stop = StopRequest()
    try:
        stop.watch()
        rendezvous = open_rendezvous(config, [str(command), *map(str, command_arguments)], notify)
        os.environ["PET_RDZV_ENDPOINT"] = rendezvous.endpoint
        words = rank_arguments(command_arguments) if parsed.module else command_arguments
        return Agent(config, rendezvous, str(command), words, stop).run_to_the_end()
    except SignalException as stopped:
        notify(f"asked to stop by {stopped.sigval.name}; no rank had started")
        return 128 + int(stopped.sigval)
    except RendezvousError as error:
        notify(f"error: {error}")
        return error.rank_exit_status if isinstance(error, PapilioError) else 1


class StopRequest:
    """The first signal to end, as an exception wherever the agent is; and a note, for where an exception gets lost.

    Torch's own handlers, which it sets whenever ranks are started, only raise: in a destructor, or under an `except
    Exception`, that is the end of the signal, and agent and ranks run on.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None

    def watch(self) -> None:
        """Take the signals from here on."""
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def check(self) -> None:
        """Raise the signal again if it did not end the agent."""
        if self._received is not None:
            raise SignalException("asked to stop", sigval=self._received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or signal.Signals(number)
        self.check()


def rank_arguments(arguments: Sequence[Any]) -> list[Any]:
    """Let a rank, `-u -m MODULE ...` in torchrun's words, start as this agent did, and be killed if it dies."""
    place = list(arguments).index("-m")
    return [*arguments[:place], *bound([FILE], signal.SIGKILL), *arguments[place:]]


class Agent(LocalElasticAgent):
    """Starts and watches this host's ranks, as torchrun does; see the module for what is different."""

    def __init__(
        self, config: LaunchConfig, rendezvous: Rendezvous, command: str, arguments: Sequence[Any], stop: StopRequest
    ) -> None:
        """`command` with `arguments` starts one rank."""
        spec = WorkerSpec(
            role=config.role,
            local_world_size=config.nproc_per_node,
            rdzv_handler=rendezvous,
            entrypoint=command,
            args=tuple(arguments),
            max_restarts=config.max_restarts,
            monitor_interval=config.monitor_interval,
            local_addr=config.local_addr,
            numa_options=config.numa_options,
        )
        assert config.logs_specs is not None
        # The rank of the whole job: torch's own prefix has the number within the host.
        super().__init__(spec, config.logs_specs, config.start_method, log_line_prefix_template="[${rank}]:")
        self._place, self._stop = rendezvous, stop
        self._is_elastic = config.min_nodes < config.max_nodes
        self._grace_s = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
        self._health_store = HealthStore(None)
        self._were_saved = False
        self._has_started = False
        self._failure = ""
        self._is_final = False
        self._asked_s = 0.0
        self._started_s = time.monotonic()

    def run_to_the_end(self) -> int:
        """Run the ranks, restarting them as allowed, and return this process's exit status."""
        handler = self._worker_group.spec.rdzv_handler
        try:
            result: RunResult | None = self.run()
        except SignalException as stopped:
            # The rendezvous stays open: the other hosts of an elastic job continue.
            return self._status_after(stopped.sigval)
        except (RendezvousError, dist.DistError) as error:
            return self._status_after_rendezvous_error(error)
        handler.shutdown()
        if self._were_saved:
            notify("all ranks saved and left; start the job again to resume")
            return RESUME_EXIT_CODE
        if result is None:
            notify("error: another host's agent ended the job")
            return 1
        if result.is_failed():
            notify(f"error: {self._failure}")
            return self._exit_without_restart() if self._is_final else 1
        return 0

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        spec = worker_group.spec
        world_size = worker_group.workers[0].world_size
        run_id, address, port = spec.rdzv_handler.get_run_id(), worker_group.master_addr, worker_group.master_port
        self._health_store = open_health_store(
            {
                "PET_RDZV_ENDPOINT": os.environ["PET_RDZV_ENDPOINT"],
                "TORCHELASTIC_RUN_ID": run_id,
                "MASTER_ADDR": str(address),
                "MASTER_PORT": str(port),
            }
        )
        if worker_group.group_rank == 0:
            self._health_store.purge(world_size)
        if self._has_started:
            notify(f"starting again on {world_size} rank{'' if world_size == 1 else 's'}")
        self._has_started, self._failure, self._were_saved = True, "", False
        self._started_s = time.monotonic()
        self._stop.check()
        started: dict[int, Any] = super()._start_workers(worker_group)
        self._stop.watch()
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._stop.check()
        first = self._first_to_fail(worker_group)
        if first is not None:
            self._let_ranks_end(*first)
            if self._have_saved():
                return self._after_saving(worker_group)
            self._notify_failure()
        elif self._is_forbidden():
            self._end_with_failed_host()
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _let_ranks_end(self, rank: int, status: int) -> None:
        """After the end of the first, give this host's other ranks time to end by themselves; then end them."""
        if status == RESUME_EXIT_CODE:
            self._wait_for_ranks(self._grace_s)
        else:
            self._note_failure(rank, status)
            self._wait_for_ranks(DRAIN_TIMEOUT_S)
        self._end_ranks(FAILED_GRACE_S)

    def _stop_workers(self, worker_group: WorkerGroup, *arguments: Any, **named: Any) -> None:
        """End the ranks before a restart; those that still run, because another host joins, get time to save."""
        is_left_behind = self._place.is_left_behind
        if None in self._exit_statuses().values() and not is_left_behind:
            notify("another host joins; the ranks save and start again")
        self._end_ranks(FAILED_GRACE_S if is_left_behind else self._grace_s)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *arguments: Any, **named: Any) -> None:
        """End the ranks for good. Whatever signal came, ranks get the one that lets them save."""
        for number in SIGNALS:
            # More signals must not cut this short, or ranks would be left behind; but Ctrl-C again means now.
            signal.signal(number, self._kill_ranks if number == signal.SIGINT else signal.SIG_IGN)
        self._end_ranks(self._grace_s)

    def _end_ranks(self, grace_s: float) -> None:
        if self._pcontext is not None:
            self._pcontext.close(signal.SIGTERM, int(grace_s))

    def _kill_ranks(self, number: int, frame: FrameType | None) -> None:
        for handler in self._handlers().values():
            if handler.proc.poll() is None:
                os.killpg(handler.proc.pid, signal.SIGKILL)

    def _handlers(self) -> dict[int, Any]:
        return {} if self._pcontext is None else self._pcontext.subprocess_handlers  # type: ignore[attr-defined]

    def _exit_statuses(self) -> dict[int, int | None]:
        """By local rank; None while it runs, minus the signal that ended it."""
        return {local_rank: handler.proc.poll() for local_rank, handler in self._handlers().items()}

    def _first_to_fail(self, worker_group: WorkerGroup) -> tuple[int, int] | None:
        """Global rank and status of a rank that did not end well; one that was killed rather than one that noticed."""
        ended = {rank: status for rank, status in self._exit_statuses().items() if status}
        if not ended:
            return None
        local_rank = min(ended, key=lambda rank: (ended[rank], rank))
        return worker_group.workers[local_rank].global_rank, ended[local_rank]

    def _wait_for_ranks(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while None in self._exit_statuses().values() and time.monotonic() < deadline_s:
            time.sleep(POLL_S)

    def _have_saved(self) -> bool:
        statuses = set(self._exit_statuses().values())
        return statuses == {RESUME_EXIT_CODE}

    def _after_saving(self, worker_group: WorkerGroup) -> RunResult:
        self._were_saved = True
        if self._is_elastic:
            notify("all ranks saved and left, for a host is taken or one joins; continuing with the hosts there are")
            self._restart_workers(worker_group)
            return RunResult(state=WorkerState.HEALTHY)
        self._exit_barrier_timeout = EXIT_BARRIER_TIMEOUT_S  # of _exit_barrier, which the base class now calls
        statuses = {worker.global_rank: RESUME_EXIT_CODE for worker in worker_group.workers}
        return RunResult(state=WorkerState.SUCCEEDED, return_values=statuses)

    def _note_failure(self, rank: int, status: int) -> None:
        heartbeat = self._health_store.heartbeats(rank + 1).get(rank)
        last_heartbeat = f"; last heartbeat at step {heartbeat.step:,}" if heartbeat is not None else ""
        reported = last_error(self._error_log(rank)) if status > 0 else ""
        failure = RankFailure(rank, host_name(), -1, describe_status(status) + last_heartbeat + reported, time.time())
        self._failure = str(self._health_store.note_failure(failure))

    def _error_log(self, rank: int) -> str | None:
        """Return the file of what a rank of this host printed on stderr."""
        local_rank = rank - self._worker_group.workers[0].global_rank
        return None if self._pcontext is None else self._pcontext.stderrs.get(local_rank)

    def _notify_failure(self) -> None:
        most = self._worker_group.spec.max_restarts
        if time.monotonic() - self._started_s > PROVEN_S:
            self._remaining_restarts = most
        if NO_RESTART_EXIT_CODE in self._exit_statuses().values():
            self._health_store.forbid_restart()
        if self._health_store.is_restart_forbidden() or NO_RESTART_EXIT_CODE in self._exit_statuses().values():
            self._is_final, self._remaining_restarts = True, 0
        if self._remaining_restarts > 0:
            notify(f"{self._failure}; restarting, restart {most - self._remaining_restarts + 1} of {most}")

    def _is_forbidden(self) -> bool:
        """Whether a mistake on another host ends the job; asked now and then."""
        if self._worker_group.group_world_size == 1 or time.monotonic() - self._asked_s < ASK_S:
            return False
        self._asked_s = time.monotonic()
        return self._health_store.is_restart_forbidden()

    def _end_with_failed_host(self) -> None:
        """End this host's ranks, which may not know of the mistake on another."""
        self._is_final, self._remaining_restarts = True, 0
        self._failure = str(self._health_store.first_failure() or "another host failed first")
        self._wait_for_ranks(DRAIN_TIMEOUT_S)
        self._end_ranks(FAILED_GRACE_S)

    def _exit_without_restart(self) -> int:
        self._exit_barrier_timeout = EXIT_BARRIER_TIMEOUT_S
        self._exit_barrier()  # type: ignore[no-untyped-call]
        return NO_RESTART_EXIT_CODE

    def _status_after(self, number: signal.Signals) -> int:
        statuses = set(self._exit_statuses().values())
        if RESUME_EXIT_CODE in statuses or (self._were_saved and not statuses - {None}):
            notify("all ranks saved and left; start the job again to resume")
            if not self._is_elastic:
                self._exit_barrier_timeout = EXIT_BARRIER_TIMEOUT_S
                self._exit_barrier()  # type: ignore[no-untyped-call]
            return RESUME_EXIT_CODE
        notify(
            f"asked to stop by {number.name}; {'all ranks were ended, without saving' if statuses else 'no rank ran'}"
        )
        return 128 + number

    def _status_after_rendezvous_error(self, error: Exception) -> int:
        if isinstance(error, RendezvousClosedError):
            what = "another host's agent ended the job"
        else:
            what = str(error)
        notify(f"error: {self._failure + '; ' if self._failure else ''}{what}")
        if self._is_final or self._health_store.is_restart_forbidden():
            return self._exit_without_restart()
        return RESUME_EXIT_CODE if self._were_saved else 1


def describe_status(status: int) -> str:
    """Describe how a process ended; minus the signal that ended it, as subprocess has it."""
    if status >= 0:
        return f"exited with status {status}"
    name = signal.Signals(-status).name
    why = " (by hand, or by the kernel out of memory)" if -status == signal.SIGKILL else ""
    return f"killed by {name}{why}"


def notify(message: str) -> None:
    """Print a line of the agent's own."""
    print(f"papilio: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_now(main())  # threads may still wait for a store
