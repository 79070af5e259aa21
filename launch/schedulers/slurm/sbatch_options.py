"""What sbatch is told of a job: its settings, read from text that a person typed, as #SBATCH lines.

sbatch takes such a line apart like a shell: at white space and at #, with quotes and backslashes. So whatever people
write (names, comments, folders) is quoted, and what ends a line is refused: it would begin another option.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from torchx import specs
from torchx.schedulers.api import StructuredOpts

from papilio.launch.schedulers.errors import RequestError
from papilio.launch.schedulers.slurm import queries

# Below this a partition's memory is not configured, and Slurm refuses jobs that ask for any.
LEAST_PARTITION_MEMORY_MB = 1_000
# A job with a time limit gets SIGTERM so long before it that its ranks can save: the grace of the component, and this.
MARGIN_S = 30
DEFAULT_GRACE_S = 30
# For ranks to start and to have something to save; a shorter job could only be requeued without end.
START_S = 60
PLAIN = re.compile(r"[A-Za-z0-9_./:=@%+,-]+")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
MAX_VALUE_LENGTH = 1_000
# 60, 60:30, 2:60:30 (minutes first where it is one or two numbers), 1-2, 1-2:30, 1-2:30:15.
TIME = re.compile(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?|(\d+)(?::(\d+))?(?::(\d+))?)", re.ASCII)
# What Slurm's 32 bits of minutes hold by far, and no cluster grants.
MAX_LIMIT_S = 10 * 365 * 86_400
NO_LIMIT = ("0", "INFINITE", "UNLIMITED", "-1")
FREE_TEXTS = ("partition", "account", "qos", "constraint", "exclude", "reservation", "comment")


@dataclass
class SlurmSettings(StructuredOpts):  # type: ignore[misc]
    """What `papilio launch -s slurm -cfg key=value,...` takes."""

    partition: str | None = None
    """Partition to run in (default: the cluster's)."""

    time: str | None = None
    """Time limit as Slurm writes it, e.g. 60 (minutes) or 1-12:00:00; shortly before, the ranks save and the job is
    requeued."""

    account: str | None = None
    """Account to charge."""

    qos: str | None = None
    """Quality of service."""

    constraint: str | None = None
    """Features that the hosts must have."""

    exclude: str | None = None
    """Hosts not to use, e.g. n7."""

    reservation: str | None = None
    """Reservation to run in."""

    comment: str | None = None
    """Comment on the job."""

    mail_user: str | None = field(default=None, metadata={"cfg_key": "mail-user"})
    """Whom to mail."""

    mail_type: str | None = field(default=None, metadata={"cfg_key": "mail-type"})
    """On which events to mail."""

    jobs_dir: str = "jobs"
    """Where the job's folder is made, with its scripts and the logs of its hosts; all hosts must see it."""


def sbatch_options(name: str, role: specs.Role, cfg: SlurmSettings, folder: Path) -> list[str]:
    """Return the options of a job whose scripts and logs are in `folder`, each as a #SBATCH line has it.

    Raises:
        RequestError: a setting is none.
    """
    fewest = role.min_replicas or role.num_replicas
    hosts = str(fewest) if fewest == role.num_replicas else f"{fewest}-{role.num_replicas}"
    given = {key: cfg[key] for key in FREE_TEXTS} | {"mail-user": cfg.mail_user, "mail-type": cfg.mail_type}
    options = [_option("job-name", name, "--name")]
    options += [f"--nodes={hosts}", "--requeue", "--open-mode=append"]
    # With a number of tasks Slurm would give an elastic job its fewest hosts; a lost one must not end it.
    options.append("--no-kill" if fewest < role.num_replicas else "--ntasks-per-node=1")
    if role.resource.cpu > 0:
        options.append(f"--cpus-per-task={role.resource.cpu}")
    if role.resource.gpu > 0:
        options.append(f"--gres=gpu:{role.resource.gpu}")
    limits = _time_options(role, cfg)
    texts = [_option(key, value, f"-cfg {key}") for key, value in given.items() if value is not None]
    available_mb = queries.partition_memory_mb(cfg.partition)
    if role.resource.memMB > 0 and (available_mb is None or available_mb > LEAST_PARTITION_MEMORY_MB):
        options.append(f"--mem={role.resource.memMB}M")
    return [*options, *limits, *texts, _option("output", f"{pattern_of(folder)}/job.log", "jobs_dir")]


def pattern_of(folder: Path) -> str:
    """Write a folder so that Slurm, which replaces %j and the like in the names of logs, leaves it as it is."""
    return str(folder).replace("%", "%%")


def limit_s(cfg: SlurmSettings) -> int | None:
    """Return the time limit that a job asks for, None without one.

    Raises:
        RequestError: it is no time.
    """
    if cfg.time is None or cfg.time.upper() in NO_LIMIT:
        return None
    match = TIME.fullmatch(cfg.time)
    if match is None:
        raise RequestError(
            f"-cfg time={cfg.time!r}: a time is minutes, minutes:seconds, hours:minutes:seconds, days-hours or "
            "days-hours:minutes:seconds, as in 60 or 1-12:00:00"
        )
    days, hours, minutes, seconds, *rest = (int(number) if number is not None else None for number in match.groups())
    if days is not None:
        return ((days * 24 + (hours or 0)) * 60 + (minutes or 0)) * 60 + (seconds or 0)
    first, second, third = rest
    if third is not None:
        return ((first or 0) * 60 + (second or 0)) * 60 + third
    return (first or 0) * 60 + (second or 0)


def _time_options(role: specs.Role, cfg: SlurmSettings) -> list[str]:
    limit = limit_s(cfg)
    if limit is None:
        return [] if cfg.time is None else [f"--time={cfg.time}"]
    grace = role.env.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")
    warning_s = (int(grace) if grace.isdecimal() else DEFAULT_GRACE_S) + MARGIN_S
    if limit > MAX_LIMIT_S:
        raise RequestError(
            f"-cfg time={str(cfg.time)[:40]} is more than 10 years; give minutes or days-hours:minutes:seconds, or "
            "leave time out"
        )
    if limit < warning_s + START_S:
        raise RequestError(
            f"-cfg time={cfg.time} is {limit} s, of which {warning_s} s are for saving (--grace_s, {MARGIN_S} s) and "
            f"{START_S} s for starting: give at least {-(-(warning_s + START_S) // 60)} (minutes), or leave time out"
        )
    return [f"--time={cfg.time}", f"--signal=TERM@{warning_s}"]


def check_text(value: str, flag: str) -> None:
    """Check that a value fits into one line of a script.

    Raises:
        RequestError: it does not.
    """
    if not value.strip():
        raise RequestError(f"{flag} {value!r}: it is empty; give a value, or leave it out")
    if found := UNPRINTABLE.search(value):
        raise RequestError(f"{flag} {value!r}: the character {found[0]!r} cannot be part of it; leave it out")
    if len(value) > MAX_VALUE_LENGTH:
        raise RequestError(
            f"{flag} {value[:40]!r}...: it has {len(value)} letters, {MAX_VALUE_LENGTH} are allowed; shorten it"
        )


def _option(key: str, value: str, flag: str) -> str:
    check_text(value, flag)
    if PLAIN.fullmatch(value):
        return f"--{key}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'--{key}="{escaped}"'
