"""Exit statuses of a rank that mean something to the agent; the agent's and the command's own are the same."""

from __future__ import annotations

import os

# sysexits.h, "temporary failure; the user is invited to retry": preempted and saved, start me again to resume.
RESUME_EXIT_CODE = os.EX_TEMPFAIL
# sysexits.h, "configuration error": what went wrong would go wrong again.
NO_RESTART_EXIT_CODE = os.EX_CONFIG
