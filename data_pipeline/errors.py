"""The one family of errors that Papilio raises itself: what each means for a retry, and for the exit status."""

from __future__ import annotations

import os
import sys


class PapilioError(Exception):
    """What was foreseen: the message says what was wrong and how to fix it, and needs no traceback.

    Errors are distinguished by class, errno or attribute, never by words in their text. A class also derives from a
    builtin (ValueError, OSError) only where callers, pydantic among them, catch that.

    Attributes:
        is_retryable: whether the same may succeed another time, with nothing changed by the user.
        exit_status: of a command that ends with it: 1 failed, 2 wrong usage, 78 (EX_CONFIG) wrong however often it
            is tried.
    """

    is_retryable: bool = False
    exit_status: int = 1

    @property
    def rank_exit_status(self) -> int:
        """Of a rank that ends with it: its agent restarts the ranks after 1, and not after 78 (EX_CONFIG)."""
        return 1 if self.is_retryable else os.EX_CONFIG


def report_error(prefix: str, error: PapilioError) -> int:
    """Print an error as one line of stderr, as the entry point `prefix`, and return the exit status."""
    print(f"{prefix}: error: {error}", file=sys.stderr, flush=True)
    return error.exit_status
