"""`papilio status`: how a job does, and its ranks in one view; of a scheduler's job, or of a run folder."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable

from torchx.runner import Runner
from torchx.specs import AppState, AppStatus

from papilio.data_pipeline.terminal import can_draw_over, has_colors, num_columns
from papilio.launch.jobs.job_status import (
    STATUS_CODES,
    UNKNOWN_CODE,
    handle_of,
    run_folder_of,
    status_lines,
    status_of,
    status_tree,
)
from papilio.launch.jobs.live_text import Ink, view_lines
from papilio.launch.schedulers.errors import SchedulerError
from papilio.launch.schedulers.runner import SCHEDULERS, make_runner
from papilio.launch.usage import UsageError
from papilio.trainer.elastic.health.live_view import LiveView, LiveViewError, read_view
from papilio.trainer.storage.retries import StorageError

DRAW_EVERY_S = 2.0
# A scheduler answers to everyone, so it is asked seldom.
ASK_EVERY_S = 10.0
NO_TERMINAL_WIDTH = 100
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
HOME, CLEAR, TO_END_OF_LINE, BELOW = "\x1b[H", "\x1b[2J", "\x1b[K", "\x1b[J"


def run_status(namespace: argparse.Namespace) -> int:
    """Print the state of a job, its ranks, and, if it failed, the first error; with --watch, again and again."""
    if namespace.watch and (namespace.json or not can_draw_over()):
        raise UsageError("--watch draws on a terminal; elsewhere use papilio status --json, or papilio logs -f")
    try:
        return _show_run(namespace) if _is_run_folder(namespace.job) else _show_job(namespace)
    except (SchedulerError, LiveViewError, StorageError) as error:
        # Not the status of a job that failed.
        print(f"papilio status: error: {error}", file=sys.stderr)
        return UNKNOWN_CODE


def _show_job(namespace: argparse.Namespace) -> int:
    with make_runner() as runner:
        handle = handle_of(namespace.job)
        shown = _Job(runner, handle)
        if namespace.json:
            view = _view_of_job(handle)
            tree = status_tree(runner, handle, shown.status)
            tree["ranks"] = None if view is None else view.model_dump(mode="json")
            print(json.dumps(tree, indent=1))
        elif namespace.watch:
            _watch(shown.draw)
        else:
            print("\n".join(shown.draw()[0]))
        return STATUS_CODES.get(shown.status.state, UNKNOWN_CODE)


class _Job:
    """A job of a scheduler, as it is drawn again and again."""

    def __init__(self, runner: Runner, handle: str) -> None:
        self._runner, self._handle = runner, handle
        self.status: AppStatus = status_of(runner, handle)
        self._asked_s = time.monotonic()

    def draw(self) -> tuple[list[str], bool]:
        """Return what to show, and whether the job has ended."""
        if time.monotonic() - self._asked_s > ASK_EVERY_S:
            self.status, self._asked_s = status_of(self._runner, self._handle), time.monotonic()
        view = _view_of_job(self._handle)
        has_ended = self.status.is_terminal()
        picture = [] if view is None else _picture(view, has_ended=has_ended)
        told = None if view is None else view.error
        return list(status_lines(self._runner, self._handle, self.status, picture, told)), has_ended


def _show_run(namespace: argparse.Namespace) -> int:
    """Show a run folder; the exit status is that of a job in this state, and 3 where nothing writes any more."""
    if namespace.json:
        print(read_view(namespace.job).model_dump_json(indent=1))
    else:

        def draw() -> tuple[list[str], bool]:
            view = read_view(namespace.job)
            return _picture(view, has_ended=False), view.state != "running"

        if namespace.watch:
            _watch(draw)
        else:
            print("\n".join(draw()[0]))
    view = read_view(namespace.job)
    if view.state == "failed":
        return STATUS_CODES[AppState.FAILED]
    return UNKNOWN_CODE if view.is_stale(time.time()) else 0


def _is_run_folder(word: str | None) -> bool:
    if word is None:
        return False
    scheme = SCHEME.match(word)
    if scheme is not None:
        return scheme[1] in ("s3", "file") and scheme[1] not in SCHEDULERS
    return os.path.isdir(word)


def _view_of_job(handle: str) -> LiveView | None:
    """Return the view in a job's run folder; None where it has none, or none yet, as jobs that do not train."""
    folder = run_folder_of(handle)
    try:
        return None if folder is None else read_view(folder)
    except (LiveViewError, StorageError):
        return None


def _picture(view: LiveView, *, has_ended: bool) -> list[str]:
    """Draw the view; of a job that has ended, whoever noticed, it is no news that nothing is written anew."""
    width = num_columns() or NO_TERMINAL_WIDTH
    if has_ended:
        state = "failed" if view.state == "running" else view.state
        view = view.model_copy(update={"state": state, "error": None})  # the job's first error is told last
    return view_lines(view, width, time.time(), Ink(has_colors=has_colors()))


def _watch(draw: Callable[[], tuple[list[str], bool]]) -> None:
    """Draw over what was drawn before, until the job has ended or Ctrl-C."""
    sys.stdout.write(CLEAR)
    try:
        while True:
            lines, has_ended = draw()
            lines = lines[: max(1, shutil.get_terminal_size().lines - 1)]
            sys.stdout.write(HOME + "".join(f"{line}{TO_END_OF_LINE}\n" for line in lines) + BELOW)
            sys.stdout.flush()
            if has_ended:
                return
            time.sleep(DRAW_EVERY_S)
    except KeyboardInterrupt:
        return
