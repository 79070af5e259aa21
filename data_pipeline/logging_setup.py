"""Logging of every process of ours, set up once, in its main. Needs no torch.

What a user asked for is printed to stdout; all else goes through loggers, to stderr.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

Role = Literal["rank", "tool", "server"]


@dataclass(frozen=True)
class _Style:
    """Levels of a role's loggers: `level` of libraries, `own_level` of papilio (NOTSET: the same)."""

    format: str
    level: int
    own_level: int


STYLES = {
    # A log of many ranks: only what somebody should look at.
    "rank": _Style("%(levelname)s: %(message)s", logging.WARNING, logging.NOTSET),
    # A person watches: our lines, as they are, and the libraries' warnings.
    "tool": _Style("%(message)s", logging.WARNING, logging.INFO),
    # A log that is read days later, by machines too.
    "server": _Style("%(asctime)s %(levelname)s %(message)s", logging.WARNING, logging.INFO),
}
# Their warnings are notices at start-up, which repeat on every rank.
NOISY_LIBRARIES = ("torchrec", "torch.fx")


def setup_logging(role: Role, rank: int = 0) -> None:
    """Configure logging of this process; call it first in `main`, after the imports.

    Args:
        role: a rank of a job, a tool that a person runs, or a server.
        rank: of a job's rank; lines of all but the first name it.
    """
    style = STYLES[role]
    form = style.format.replace("%(message)s", f"rank {rank}: %(message)s") if rank else style.format
    # By force: importing torch and fbgemm_gpu has set up formats of theirs.
    logging.basicConfig(level=style.level, format=form, force=True)
    logging.getLogger("papilio").setLevel(style.own_level)
    for name in NOISY_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
