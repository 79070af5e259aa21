"""How far long work has come: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm  # type: ignore[import-untyped]

from papilio.data_pipeline.terminal import can_draw_over, num_columns

_LINE_EVERY_S = 10.0
_logger = logging.getLogger(__name__)


class Progress:
    """Progress of one stage (a context manager).

    With `is_kept` the bar stays when the stage is over, and a log gets a last line; else its caller says what came of
    it.
    """

    def __init__(self, name: str, total: int | None, unit: str, *, is_shown: bool, is_kept: bool = True) -> None:
        self._name, self._total, self._unit, self._is_shown = name, total, unit, is_shown
        self._done = 0
        self._start_s = self._line_s = time.monotonic()
        # Asked once: a bar that is closed counts itself as disabled.
        self._has_bar = is_shown and can_draw_over(sys.stderr)
        self._is_kept = is_kept
        self._bar = tqdm(
            total=total,
            desc=name,
            unit=unit,
            unit_scale=True,
            disable=not self._has_bar,
            leave=is_kept,
            ncols=num_columns(sys.stderr),
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        self._bar.close()
        if error_type is None and self._is_kept:
            self._log_line()

    def advance(self, amount: int) -> None:
        """Count `amount` more units as done."""
        self._done += amount
        self._bar.update(amount)
        if time.monotonic() - self._line_s > _LINE_EVERY_S:
            self._log_line()

    def _log_line(self) -> None:
        self._line_s = time.monotonic()
        if self._is_shown and not self._has_bar:
            total = f" of {self._total:,}" if self._total else ""
            _logger.info(
                "%s: %s%s %s, %.1f s", self._name, f"{self._done:,}", total, self._unit, self._line_s - self._start_s
            )
