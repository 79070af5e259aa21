"""Starts a job of `benchmarks.faults` again and again, and kills it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.faults_data import Size
from benchmarks.faults_evidence import Trained, joined_ranks, read_logs, step_of
from benchmarks.faults_ranks import Attempt, Zygote, rank_environment
from papilio.trainer.checkpoint.folder import CheckpointFolder
from papilio.trainer.elastic.agent import DRAIN_TIMEOUT_S
from papilio.trainer.elastic.health.health_store import RankFailure, host_name, open_health_store

END_TIMEOUT_S = 30.0
RUN_TIMEOUT_S = 900.0
POLL_S = 0.002


class FaultError(RuntimeError):
    """A job did what it must not; the message says what, with the end of its output."""


@dataclass
class Job:
    """One run folder, and what happened to it.

    Attributes:
        kills: by what they hit: "save", "prune", "start-up", "training", "end".
        survivors_end_s: how long after the kill of one rank the last other one ended.
        told_to_end: ranks that a kill in start-up left waiting for all to join; our agent ends them after 6 s.
        stuck: others that did not end by themselves within 30 s after a kill.
        damaged: committed checkpoints in which something could not be read.
        uncommitted: folders without a marker that kills left; `swept` of them were removed by a later start.
        not_newest: starts that went on from another checkpoint than the newest complete one.
    """

    run_dir: str
    attempts: list[Attempt] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    survivors_end_s: list[float] = field(default_factory=list)
    told_to_end: int = 0
    stuck: int = 0
    damaged: int = 0
    uncommitted: int = 0
    swept: int = 0
    not_newest: int = 0

    @property
    def folder(self) -> CheckpointFolder:
        """Its checkpoints."""
        return CheckpointFolder(os.path.join(self.run_dir, "checkpoints"))

    @property
    def world_sizes(self) -> list[int]:
        """Ranks of every attempt."""
        return [attempt.world_size for attempt in self.attempts]


@dataclass(frozen=True)
class Found:
    """The checkpoints that an attempt finds: the newest complete one, and those that were never completed."""

    newest: str | None
    abandoned: frozenset[str]


class Killer:
    """Starts a job again and again, and kills it."""

    def __init__(self, zygote: Zygote, recipe: str, size: Size, randomness: random.Random) -> None:
        self._zygote = zygote
        self._recipe = recipe
        self._size = size
        self._random = randomness

    def run_undisturbed(self, run_dir: str, world_size: int) -> Job:
        """Run a job to its end."""
        job = Job(run_dir)
        self._wait_for_success(job, self._start(job, world_size))
        return job

    def run_and_kill(self, run_dir: str, world_sizes: Sequence[int], num_kills: int) -> Job:
        """Run a job to its end, killing it so many times on the way if it lasts so long."""
        job = Job(run_dir)
        was_killed = True
        while was_killed:
            found = _what_is_there(job)
            others = [size for size in world_sizes if [size] != job.world_sizes[-1:]] or list(world_sizes)
            process_ids = self._start(job, self._random.choice(others))
            if sum(job.kills.values()) < num_kills:
                was_killed = self._kill_some_time(job, process_ids, found)
            else:
                self._wait_for_success(job, process_ids)
                was_killed = False
            _look_at(job, found)
        return job

    def _start(self, job: Job, world_size: int) -> list[int]:
        number = len(job.attempts)
        environment = rank_environment(self._zygote.store.port, os.path.basename(job.run_dir), world_size)
        arguments = ["--recipe", self._recipe, f"--output.run_dir={job.run_dir}"]
        attempt = Attempt(arguments, world_size, f"{job.run_dir}.attempt_{number:03}", environment)
        job.attempts.append(attempt)
        return self._zygote.start(attempt)

    def _wait_for_success(self, job: Job, process_ids: list[int]) -> None:
        if not self._wait_until_ended(process_ids, time.monotonic() + RUN_TIMEOUT_S):
            raise FaultError(f"{job.run_dir} has not ended after {RUN_TIMEOUT_S:g} s\n{_last_words(job)}")
        statuses = list(self._zygote.ended().values())
        if any(statuses):
            raise FaultError(f"{job.run_dir} was not killed, yet ended with {statuses}\n{_last_words(job)}")

    def _kill_some_time(self, job: Job, process_ids: list[int], found: Found) -> bool:
        """Kill at a random moment; returns whether the job had not ended before."""
        if not self._wait_for_moment(job, process_ids):
            self._wait_for_success(job, process_ids)
            return False
        victims = process_ids if self._random.random() < 0.5 else [self._random.choice(process_ids)]
        for process_id in victims:
            _kill(process_id, signal.SIGKILL)
        begin_s = time.monotonic()
        self._note_death(job, process_ids.index(victims[0]))
        self._let_others_end(job, process_ids, begin_s)
        if len(victims) < len(process_ids):
            job.survivors_end_s.append(time.monotonic() - begin_s)
        if not any(self._zygote.ended().values()):
            return False  # it had just ended
        job.kills[self._what_was_hit(job, found)] += 1
        return True

    def _let_others_end(self, job: Job, process_ids: list[int], begin_s: float) -> None:
        """Give the other ranks 30 s; those that still wait for all to join are told to end, as our agent tells all."""
        if not self._wait_until_ended(process_ids, begin_s + DRAIN_TIMEOUT_S):
            waiting = [
                process_id
                for rank, process_id in enumerate(process_ids)
                if process_id not in self._zygote.ended() and rank not in joined_ranks(job.attempts[-1])
            ]
            job.told_to_end += sum(_kill(process_id, signal.SIGTERM) for process_id in waiting)
        if not self._wait_until_ended(process_ids, begin_s + END_TIMEOUT_S):
            left = [process_id for process_id in process_ids if process_id not in self._zygote.ended()]
            job.stuck += sum(_kill(process_id, signal.SIGKILL) for process_id in left)
            self._wait_until_ended(process_ids, time.monotonic() + END_TIMEOUT_S)

    def _wait_until_ended(self, process_ids: list[int], deadline_s: float) -> bool:
        while len(self._zygote.ended()) < len(process_ids):
            if time.monotonic() > deadline_s:
                return False
            time.sleep(POLL_S)
        return True

    def _wait_for_moment(self, job: Job, process_ids: list[int]) -> bool:
        """Wait for some part of a save, or for some time; False if all ranks end before."""
        num_saves, after_s, seen = 0, 0.0, set(job.folder.names())
        if self._random.random() < 0.5:
            num_saves, after_s = self._random.choice([1, 1, 2, 3]), self._random.expovariate(1 / 0.03)
        else:
            after_s = self._random.uniform(0, self._size.longest_wait_s)
        deadline_s = time.monotonic() + after_s
        while num_saves or time.monotonic() < deadline_s:
            if len(self._zygote.ended()) == len(process_ids):
                return False
            new = set(job.folder.names()) - seen
            if num_saves and new:
                seen |= new
                num_saves -= 1
                deadline_s = time.monotonic() + after_s
            time.sleep(POLL_S)
        return True

    def _note_death(self, job: Job, rank: int) -> None:
        """Say who died, as our agent does."""
        health_store = open_health_store(job.attempts[-1].environment)
        health_store.note_failure(RankFailure(rank, host_name(), -1, "killed by SIGKILL", time.time()))

    def _what_was_hit(self, job: Job, found: Found) -> str:
        """Say what the last attempt was doing when it was killed, from what it left."""
        now, trained = _what_is_there(job), read_logs(job.attempts[-1])
        newest_step = step_of(now.newest) if now.newest is not None else 0
        left = now.abandoned - found.abandoned
        if any(step_of(name) > newest_step for name in left):
            return "save"
        if left:
            return "prune"
        if newest_step == self._size.num_steps:
            return "end"
        return "training" if trained.steps else "start-up"


def _what_is_there(job: Job) -> Found:
    committed = job.folder.committed_names()
    return Found(committed[-1] if committed else None, frozenset(job.folder.names()).difference(committed))


def _look_at(job: Job, found: Found) -> None:
    """See what the last attempt did with the checkpoints that it found, and what it left."""
    trained: Trained = read_logs(job.attempts[-1])
    if trained.steps or trained.resumed:
        job.not_newest += trained.resumed != found.newest
    now = _what_is_there(job)
    job.swept += len(found.abandoned - now.abandoned)
    job.uncommitted += len(now.abandoned - found.abandoned)
    for name in job.folder.committed_names():
        job.damaged += any(wrong for _, _, wrong in job.folder.verify(name))


def _kill(process_id: int, number: signal.Signals) -> bool:
    try:
        os.kill(process_id, number)
    except ProcessLookupError:
        return False
    return True


def _last_words(job: Job) -> str:
    words = []
    for rank in range(job.attempts[-1].world_size):
        with open(job.attempts[-1].output_path(rank), encoding="utf-8", errors="replace") as file:
            words.append(f"--- rank {rank}:\n{file.read()[-3000:]}")
    return "\n".join(words)
