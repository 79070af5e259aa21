"""The one family of errors that the code foresees: the message names what is wrong and the fix, and needs no traceback.

It stands in the lowest package because all others import it.
"""

from __future__ import annotations

import os


class PapilioError(Exception):
    """Base of every error class of ours; a class that callers catch as a builtin one derives from that, too.

    Attributes:
        is_retryable: Whether the same may go well another time, with nothing changed in the job's input.
        exit_status: With which a rank that ends with the error leaves. The agent does not restart a job after 78
            (sysexits.h, "configuration error"), because what went wrong would go wrong again; 1 is any other failure.
    """

    is_retryable: bool = False
    exit_status: int = os.EX_CONFIG
