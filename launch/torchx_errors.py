"""What `torchx run` shows of a mistake in a component's arguments: one line, where it would show a traceback."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

from papilio.launch.schedulers.errors import SchedulerError
from papilio.launch.usage import UsageError
from papilio.sharding.hardware import HardwareError

FORESEEN = (UsageError, SchedulerError, HardwareError)


class OneLineErrors:
    """An excepthook that shows foreseen errors in one line, and leaves all others to the hook before it."""

    @classmethod
    def install(cls) -> None:
        """Take the hook, in the `torchx` command only."""
        if Path(sys.argv[0]).name == "torchx" and not isinstance(getattr(sys.excepthook, "__self__", None), cls):
            sys.excepthook = cls().show

    def __init__(self) -> None:
        """Remember who showed errors before."""
        self._before = sys.excepthook

    def show(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Show an error that nobody caught."""
        if issubclass(kind, FORESEEN):
            print(f"torchx: error: {error}", file=sys.stderr)
        else:
            self._before(kind, error, trace)
