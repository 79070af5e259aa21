"""The first error of a job, from the host where it happened, out of the logs of all its hosts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from papilio.launch.schedulers.job_folder import last_event, read_events

# What the agents and ranks say once they know (trainer/elastic/health/failures.py, trainer/elastic/agent.py).
FAILED_FIRST = re.compile(r"rank \d+ \(host \S+\) failed first(, at step [\d,]+)?: .*")
# All that an agent knows of a rank that left no word on the way.
EXITED = re.compile(r" failed first(, at step [\d,]+)?: exited with status \d+")
ERROR = re.compile(r"papilio[ \w]*: error: (.*)")
RANK_PREFIX = re.compile(r"^\[\d+\]:(?:\[rank\d+\]: ?)?")
# What an agent says before its ranks start anew.
AGAIN = re.compile(r"^papilio: starting again on ")
ATTEMPT = "papilio: attempt "
# What Slurm itself says, in the job's own log: of hosts that it could not start anything on.
SLURM_ERROR = re.compile(r"^(?:srun|slurmstepd|slurmd|sbatch)\S*: (?:error|fatal): (.*)")
# What Slurm says of every job that ends with a failure, or is told to end.
NO_REASON = re.compile(r"\*\*\*|Exited with exit code|^_slurm|Terminated|Killed|Force Terminated|Aborted")
# Scripts that cannot compare a number say so; whatever ended the job, this did not.
SCRIPT_WORDS = re.compile(r": line \d+: \[: ")
JOB_LOG = "job.log"
# Of a log, from its end: enough for a traceback of each of eight ranks.
MAX_BYTES = 256 * 1024


class ErrorWatch:
    """Finds the first error among the lines that a job prints while it runs."""

    def __init__(self) -> None:
        self._failed_first: str | None = None
        self._error: str | None = None

    @property
    def found(self) -> str | None:
        """Who failed first and why, or else the first error of any kind."""
        is_bare = self._failed_first is not None and EXITED.search(self._failed_first) is not None
        if is_bare and self._error is not None and not FAILED_FIRST.search(self._error):
            return self._error  # the rank had said itself why it ends
        return self._failed_first or self._error

    def take(self, line: str) -> None:
        """Take in a line; what was before a restart is over."""
        if AGAIN.search(line):
            self._failed_first = self._error = None
        failed_first, error = FAILED_FIRST.search(line), ERROR.search(line)
        self._failed_first = self._failed_first or (failed_first[0] if failed_first else None)
        self._error = self._error or (error[1] if error else None)


def find_first_error(folder: str | None, logs: Mapping[int, Path]) -> str | None:
    """Return who failed first and why, in a line or two, or None if the logs of the last attempt do not say.

    `folder` is the job's, None for a job that another wrote the logs of; hosts that failed earlier are asked first.
    """
    lines = {host: _readable(path) for host, path in logs.items()}
    order = sorted(lines, key=lambda host: (_failed_s(folder, host), host))
    for pattern, part in ((FAILED_FIRST, 0), (ERROR, 1)):
        for host in order:
            found = next((match for match in map(pattern.search, lines[host]) if match is not None), None)
            if found is not None:
                return found[part] if pattern is FAILED_FIRST else f"host {host}: {found[part]}"
    return slurm_error(folder) or _last_words(order, lines)


def slurm_error(folder: str | None) -> str | None:
    """Return what Slurm says of the last attempt in the job's own log, such as a host on which nothing could start."""
    path = Path(folder or "", JOB_LOG)
    try:
        lines = _last_attempt(path) if folder is not None else []
    except OSError:
        return None
    said = [match[1] for match in map(SLURM_ERROR.match, lines) if match is not None]
    reason = next((words for words in said if not NO_REASON.search(words)), None)
    return f"Slurm says: {reason} ({path})" if reason is not None else None


def _last_words(order: list[int], lines: Mapping[int, list[str]]) -> str | None:
    """The last line of the host that failed first, which at least says something."""
    said = [(host, line) for host in order for line in lines[host][-1:]]
    return f"host {said[0][0]}, last line: {said[0][1]}" if said else None


def _failed_s(folder: str | None, host: int) -> float:
    if folder is None:
        return 0.0
    ended = last_event(read_events(folder, f"host_{host}.events"), "ended")
    return ended.time_s if ended is not None and ended.details[0] != "0" else float("inf")


def _readable(path: Path) -> list[str]:
    try:
        return _last_attempt(path)
    except OSError as error:
        return [f"papilio: error: {path} cannot be read: {error.strerror}"]


def _last_attempt(path: Path) -> list[str]:
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - MAX_BYTES))
        lines = log.read().decode(errors="replace").splitlines()
    begins = [index for index, line in enumerate(lines) if line.startswith(ATTEMPT)]
    lines = lines[begins[-1] + 1 :] if begins else lines
    texts = (RANK_PREFIX.sub("", line).strip() for line in lines)
    return [text for text in texts if text and not SCRIPT_WORDS.search(text)]
