"""One line of the report of a preflight, and what it is made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from papilio.launch.preflight.facts import Card, HostFacts, LinkFacts, PlanFacts
from papilio.trainer.config import Config

Status = Literal["ok", "warn", "FAIL"]
MAX_NAMED = 4


@dataclass(frozen=True)
class Finding:
    """What a check found on some hosts. `fix` is a command or an advice, empty when all is well."""

    check: str
    status: Status
    hosts: tuple[str, ...]
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Evidence:
    """All that the first host knows; lists are by number of the host, None for one that did not say."""

    config: Config
    nproc: int
    endpoint: str
    hardware: str | None
    cards: Sequence[Card | None]
    absent: dict[int, str]
    known_names: dict[int, str]
    arrived_s: float
    facts: Sequence[HostFacts | None]
    plan: PlanFacts
    links: Sequence[LinkFacts | None]
    why_no_links: str

    @property
    def num_hosts(self) -> int:
        """Hosts of the job, whether they came or not."""
        return len(self.cards)

    @property
    def present(self) -> list[tuple[int, Card, HostFacts]]:
        """The hosts that told what they found."""
        return [
            (index, card, facts)
            for index, (card, facts) in enumerate(zip(self.cards, self.facts, strict=True))
            if card is not None and facts is not None
        ]

    def name(self, index: int) -> str:
        """Name a host as short as can be: as it names itself, or the scheduler if that is not enough, or by number."""
        card = self.cards[index]
        known = _short(self.known_names.get(index, ""))
        if card is None:
            return known or f"host {index}"
        names = [_short(other.name) for other in self.cards if other is not None]
        short = _short(card.name)
        return short if names.count(short) == 1 else known or f"{short}#{index}"

    @property
    def everyone(self) -> tuple[str, ...]:
        """All hosts that are there."""
        return tuple(self.name(index) for index, *_ in self.present)


def named(hosts: Iterable[str], num_hosts: int) -> str:
    """Say which hosts, in few words."""
    names = list(hosts)
    if len(names) == num_hosts:
        return f"all {num_hosts}" if num_hosts > 1 else names[0]
    if len(names) > MAX_NAMED:
        return f"{', '.join(names[: MAX_NAMED - 1])} and {len(names) - MAX_NAMED + 1} more"
    return ", ".join(names)


def alike(findings: Iterable[Finding]) -> list[Finding]:
    """Put findings that differ in nothing but the host into one."""
    groups: dict[tuple[str, Status, str, str], list[str]] = {}
    for finding in findings:
        groups.setdefault((finding.check, finding.status, finding.found, finding.fix), []).extend(finding.hosts)
    return [Finding(check, status, tuple(hosts), found, fix) for (check, status, found, fix), hosts in groups.items()]


def odd_ones_out(values: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Return the value that most hosts have, the first host's where it is a draw, and the others', by host."""
    counts = Counter(values.values())
    usual = max(counts, key=lambda value: counts[value])  # the first of equal ones
    return usual, {host: value for host, value in values.items() if value != usual}


def or_all_well(check: str, problems: Sequence[Finding], evidence: Evidence, say: Callable[[], str]) -> list[Finding]:
    """Return the problems, or one line that says what was found well."""
    return alike(problems) if problems else [Finding(check, "ok", evidence.everyone, say())]


def _short(name: str) -> str:
    """Drop the domain of a name; addresses stay."""
    return name if name.replace(".", "").isdigit() or ":" in name else name.partition(".")[0]
