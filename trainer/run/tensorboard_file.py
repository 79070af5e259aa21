"""TensorBoard's events of a run, written by the thread that measures.

SummaryWriter writes in a thread that dies with a traceback on a full disk, after which its queue blocks who fills it.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from papilio.trainer.run.appended_file import AppendedFile

FILE_VERSION = "brain.Event:2"


class EventsFile:
    """A new file of events in the folder of a run's; one that resumes after `step` steps hides older points."""

    def __init__(self, folder: str, step: int = 0) -> None:
        name = f"events.out.tfevents.{int(time.time()):010}.{os.uname().nodename}.{os.getpid()}.{time.time_ns()}"
        with suppress(OSError):  # logged when the file is opened
            os.makedirs(folder, exist_ok=True)
        self._file = AppendedFile(os.path.join(folder, name))
        self._append(Event(step=step + 1 if step else 0, file_version=FILE_VERSION))
        if step:
            self._append(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def append(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Add a point to each value's curve."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        summary = Summary(value=[Summary.Value(tag=f"{kind}/{name}", simple_value=n) for name, n in numbers.items()])
        self._append(Event(step=step, summary=summary))

    def close(self) -> None:
        """Close it."""
        self._file.close()

    def _append(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue())
