"""Are the links between ranks as fast as the hardware file says?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from papilio.launch.preflight.facts import RankSpeed
from papilio.launch.preflight.finding import Evidence, Finding, Status
from papilio.sharding.hardware import HardwareError, Rates, load_hardware

# gloo's large all-to-alls move at half the line's rate, as its directions do not overlap (two hosts shaped to 1 Gbit/s,
# torch 2.13, 2026-11-20): less than this share of the profile's figure is another matter.
MIN_SHARE = 0.4
FAIR_SHARE = 0.8
# A link that is slower than those between the other hosts by more than chance.
FAIR_SHARE_OF_USUAL = 0.6
MIN_LINKS_TO_COMPARE = 3
# Beyond what the wrong profile, or cores that hosts share, explain: the link itself is at fault.
GROSS_SHARE = 1 / 30
# What the slowest network of any cluster gives a host (1 Gbit/s), where neither a profile nor other links say more.
PLAIN_BYTES_PER_S = 125e6
# `papilio calibrate` writes a rate like this for what one rank cannot measure.
UNKNOWN_BYTES_PER_S = 1e14


def check_links(evidence: Evidence) -> list[Finding]:
    """Hold what was measured against the profile, and the hosts' links against each other."""
    if evidence.nproc * evidence.num_hosts == 1:
        return [Finding("links", "ok", evidence.everyone, "one rank talks to nobody")]
    if evidence.why_no_links:
        return [Finding("links", "warn", (), f"not measured: {evidence.why_no_links}", "the lines above come first")]
    stuck = [
        Finding("links", "FAIL", (evidence.name(index),), error, _advice(evidence, is_profile=False))
        for index, links in enumerate(evidence.links)
        if links is not None
        for error in links.errors
    ]
    if stuck:
        return stuck
    speeds = [links.speeds for links in evidence.links if links is not None]
    slow = _slow_links(evidence, speeds)
    return [*slow, _collectives(evidence, speeds, is_explained=bool(slow))]


def _slow_links(evidence: Evidence, speeds: Sequence[Sequence[RankSpeed]]) -> list[Finding]:
    """Name the hosts whose links to the next host are slow."""
    if evidence.num_hosts == 1:
        return []
    # By host: bytes a second of a rank, from the host before.
    rates = [host[0].message_bytes / max(1e-9, *(speed.neighbour_s for speed in host)) for host in speeds]
    yardstick = _yardstick(evidence, rates)
    slow = [host for host, rate in enumerate(rates) if yardstick.judge(rate) != "ok"]
    if len(slow) == len(rates):
        found = f"no host gets more than {_rate(max(rates))} a rank from the one before"
        return [_slow(evidence, yardstick, max(rates), slow, found)]
    findings, left = [], set(slow)
    for host in slow:
        after = (host + 1) % len(rates)
        if len(rates) > 2 and {host, after} <= left:  # both of its links
            left -= {host, after}
            rate = min(rates[host], rates[after])
            found = f"{_rate(rate)} a rank between it and both its neighbours"
            findings.append(_slow(evidence, yardstick, rate, [host], found))
    for host in sorted(left):
        before = (host - 1) % len(rates)
        found = f"{_rate(rates[host])} a rank from {evidence.name(before)} to {evidence.name(host)}"
        findings.append(_slow(evidence, yardstick, rates[host], [before, host], found))
    return findings


@dataclass(frozen=True)
class _Yardstick:
    """What a link is held against: what is expected, in words too; how slow is worth a line; the worst it can be."""

    bytes_per_s: float
    words: str
    fair_share: float
    worst: Status
    is_profile: bool
    usual_bytes_per_s: float = 0.0

    def is_gross(self, rate: float) -> bool:
        """Whether a link is so slow beside the others that nothing else explains it."""
        return rate < GROSS_SHARE * self.usual_bytes_per_s

    def judge(self, rate: float) -> Status:
        if self.is_gross(rate):
            return "FAIL"
        if rate < MIN_SHARE * self.bytes_per_s:
            return self.worst
        return "warn" if rate < self.fair_share * self.bytes_per_s else "ok"


def _yardstick(evidence: Evidence, rates: Sequence[float]) -> _Yardstick:
    """Take the hosts' profile or, where they do better than it says, what most of the links reach."""
    expected = _between_hosts(evidence)
    usual = _usual(rates)
    if expected * MIN_SHARE > usual * FAIR_SHARE_OF_USUAL:
        words = f"{_profile(evidence)} has {_rate(expected)}"
        return _Yardstick(expected, words, MIN_SHARE, _worst_status(evidence), is_profile=True, usual_bytes_per_s=usual)
    worst: Status = "warn" if _is_one_machine(evidence) else "FAIL"
    if not usual:
        plain = PLAIN_BYTES_PER_S / evidence.nproc
        return _Yardstick(plain, f"1 Gbit/s Ethernet gives {_rate(plain)}", MIN_SHARE, worst, is_profile=False)
    words = f"others reach {_rate(usual)}"
    return _Yardstick(usual, words, FAIR_SHARE_OF_USUAL, worst, is_profile=False, usual_bytes_per_s=usual)


def _usual(rates: Sequence[float]) -> float:
    """Return what most of the links reach; 0.0 where there are too few to tell, unless they are worlds apart."""
    if len(rates) < MIN_LINKS_TO_COMPARE:
        return max(rates) if min(rates) < GROSS_SHARE * max(rates) else 0.0
    # The upper quartile: one slow host has two slow links, which may be most of them.
    return sorted(rates)[(3 * len(rates) - 1) // 4]


def _collectives(evidence: Evidence, speeds: Sequence[Sequence[RankSpeed]], *, is_explained: bool) -> Finding:
    """Hold the collectives of all ranks against what the planner expects of them."""
    everyone = [speed for host in speeds for speed in host]
    size, rates = everyone[0].message_bytes, _rates(evidence)
    seconds = {
        "all-to-all": max(speed.all_to_all_s for speed in everyone),
        "all-reduce": max(speed.all_reduce_s for speed in everyone),
    }
    told, worst = [], 1.0
    for name, took_s in seconds.items():
        text = f"{name} {_rate(size * _sent_share(name, evidence) / took_s)}"
        if rates is not None:
            share = _expected_s(name, size, rates, evidence) / took_s
            worst = min(worst, share)
            text += f" ({share:.0%} of {_profile(evidence)}'s)"
        told.append(text)
    found = f"{everyone[0].backend}, {size / 1024:,.0f} KiB a rank: {', '.join(told)}"
    if is_explained or worst >= FAIR_SHARE:
        return Finding("links", "ok", evidence.everyone, found)
    if worst < MIN_SHARE:
        return Finding("links", _worst_status(evidence), evidence.everyone, found, _advice(evidence, is_profile=True))
    fix = "the plan's times will not hold; papilio calibrate measures what these hosts do"
    return Finding("links", "warn", evidence.everyone, found, fix)


def _worst_status(evidence: Evidence) -> Status:
    """Links that are slower than a profile that nobody named, or between hosts that are one machine, prove nothing."""
    return "warn" if evidence.hardware is None or _is_one_machine(evidence) else "FAIL"


def _is_one_machine(evidence: Evidence) -> bool:
    """Whether hosts are processes of one machine, which share its cores."""
    names = [card.name for card in evidence.cards if card is not None]
    return len(set(names)) < len(names)


def _sent_share(collective: str, evidence: Evidence) -> float:
    """Bytes that a rank sends for each byte of its buffer."""
    ranks = evidence.nproc * evidence.num_hosts
    share = (ranks - 1) / ranks
    return share if collective == "all-to-all" else 2 * share


def _expected_s(collective: str, size: int, rates: Rates, evidence: Evidence) -> float:
    """Seconds by the planner's formulas (sharding/planner/cost.py), for one message of so many bytes."""
    per_host, num_hosts = evidence.nproc, evidence.num_hosts
    ranks = per_host * num_hosts
    if collective == "all-to-all":
        inside = (per_host - 1) / ranks * size / rates.all_to_all_bytes_per_s
        across = (ranks - per_host) / ranks * size / rates.inter_host_bytes_per_s if num_hosts > 1 else 0.0
        latency_s = rates.inter_host_latency_s if num_hosts > 1 else rates.all_to_all_latency_s
        return latency_s + max(inside, across)
    seconds = (rates.all_reduce_latency_s or rates.all_to_all_latency_s) + (
        2 * (per_host - 1) / per_host * size / rates.all_reduce_bytes_per_s
    )
    if num_hosts > 1:
        share = 2 * (num_hosts - 1) / num_hosts / per_host
        seconds += rates.inter_host_latency_s + share * size / rates.inter_host_bytes_per_s
    return seconds


def _slow(evidence: Evidence, yardstick: _Yardstick, rate: float, hosts: Iterable[int], found: str) -> Finding:
    names = tuple(evidence.name(host) for host in hosts)
    fix = _advice(evidence, is_profile=yardstick.is_profile, is_gross=yardstick.is_gross(rate))
    words, usual = yardstick.words, yardstick.usual_bytes_per_s
    if yardstick.is_gross(rate):
        words = f"others reach {_rate(usual)}, {usual / rate:,.0f} times as much"
    return Finding("links", yardstick.judge(rate), names, f"{found}; {words}", fix)


def _advice(evidence: Evidence, *, is_profile: bool, is_gross: bool = False) -> str:
    if _is_one_machine(evidence) and not is_gross:
        return "none: these hosts are processes of one machine, which share its cores"
    if is_profile and evidence.hardware is None and not is_gross:
        return "name the hosts' profile (--host), or measure one: papilio calibrate"
    if evidence.plan.device == "cuda":
        return (
            "run with NCCL_DEBUG=INFO and see which network it takes (NCCL_SOCKET_IFNAME, NCCL_IB_HCA); ibstat and "
            "ethtool show a port that is down or slow"
        )
    return "see the interface's speed there (ethtool INTERFACE), and which one gloo takes (GLOO_SOCKET_IFNAME)"


def _rates(evidence: Evidence) -> Rates | None:
    """Return what the profile says of ranks like these, if it says how fast they talk to each other."""
    try:
        rates = load_hardware(_profile(evidence)).rates_of(evidence.nproc)
    except HardwareError:
        return None  # the plan says so
    return rates if rates.inter_host_bytes_per_s < UNKNOWN_BYTES_PER_S else None


def _between_hosts(evidence: Evidence) -> float:
    """Return the profile's bytes a second of a rank to other hosts, 0 where it does not say."""
    rates = _rates(evidence)
    return rates.inter_host_bytes_per_s if rates is not None else 0.0


def _profile(evidence: Evidence) -> str:
    return evidence.hardware or evidence.plan.hardware


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:,.2f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:,.1f} MB/s"
