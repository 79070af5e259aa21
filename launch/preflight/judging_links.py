"""Are the links between ranks as fast as the hardware file says?"""

from __future__ import annotations

import statistics

from launch.preflight.facts import RankSpeed
from launch.preflight.finding import Evidence, Finding
from sharding.hardware import HardwareError, Rates, load_hardware

# gloo's large all-to-alls move at half the line's rate, as its directions do not overlap (two hosts shaped to 1 Gbit/s,
# torch 2.13, 2026-11-20): less than this share of the profile's figure is another matter.
MIN_SHARE = 0.4
FAIR_SHARE = 0.8
# A link that is slower than those between the other hosts by more than chance.
MIN_SHARE_OF_MEDIAN = 0.6
MIN_LINKS_TO_COMPARE = 3


def check_links(evidence: Evidence) -> list[Finding]:
    """Hold what was measured against the profile, and the hosts' links against each other."""
    if evidence.nproc * evidence.num_hosts == 1:
        return [Finding("links", "ok", evidence.everyone, "one rank talks to nobody")]
    if evidence.why_no_links:
        return [Finding("links", "warn", (), f"not measured: {evidence.why_no_links}", "mend the rest first")]
    stuck = [
        Finding("links", "FAIL", (evidence.name(index),), error, _advice(evidence))
        for index, links in enumerate(evidence.links)
        if links is not None
        for error in links.errors
    ]
    if stuck:
        return stuck
    speeds = [links.speeds for links in evidence.links if links is not None]
    slow = _slow_neighbours(evidence, speeds)
    return [*slow, *_collectives(evidence, speeds, is_explained=bool(slow))]


def _slow_neighbours(evidence: Evidence, speeds: list[tuple[RankSpeed, ...]]) -> list[Finding]:
    """Name the hosts whose links to the next host are slow."""
    if evidence.num_hosts == 1:
        return []
    rates = _link_rates(speeds)
    hosts = range(evidence.num_hosts)
    expected = _rates(evidence)
    usual = statistics.median(rates) if len(rates) >= MIN_LINKS_TO_COMPARE else None
    floor, against = 0.0, ""
    if usual is not None:
        floor, against = MIN_SHARE_OF_MEDIAN * usual, f"the other links reach {_rate(usual)}"
    if expected is not None and expected.inter_host_bytes_per_s * MIN_SHARE > floor:
        floor = expected.inter_host_bytes_per_s * MIN_SHARE
        against = f"{_profile(evidence)} has {_rate(expected.inter_host_bytes_per_s)} a rank"
    slow = [host for host in hosts if rates[host] < floor]
    if len(slow) == len(rates) > 2:
        return [_slow(evidence, list(hosts), f"ranks send {_rate(min(rates))} to the next host; {against}")]
    findings, left = [], set(slow)
    for host in hosts:  # both its links are slow: the one to the next host and the one from the host before
        before = (host - 1) % len(rates)
        if len(rates) > 2 and {host, before} <= left:
            left -= {host, before}
            rate = min(rates[host], rates[before])
            findings.append(
                _slow(evidence, [host], f"its links to both neighbours carry {_rate(rate)} a rank; {against}")
            )
    for host in sorted(left):
        after = (host + 1) % len(rates)
        found = f"{evidence.name(host)} to {evidence.name(after)}: {_rate(rates[host])} a rank; {against}"
        findings.append(_slow(evidence, [host, after], found))
    return findings


def _link_rates(speeds: list[tuple[RankSpeed, ...]]) -> list[float]:
    """Return bytes a second of a rank, from each host to the next: the faster of the times that its two ends took."""
    seconds = [max(speed.neighbour_s for speed in host) for host in speeds]
    size = speeds[0][0].message_bytes
    return [size / max(1e-9, min(seconds[host], seconds[(host + 1) % len(seconds)])) for host in range(len(seconds))]


def _collectives(evidence: Evidence, speeds: list[tuple[RankSpeed, ...]], *, is_explained: bool) -> list[Finding]:
    """Hold the collectives of all ranks against what the planner expects of them."""
    everyone = [speed for host in speeds for speed in host]
    size, backend = everyone[0].message_bytes, everyone[0].backend
    rates = _rates(evidence)
    seconds = {
        "all-to-all": max(speed.all_to_all_s for speed in everyone),
        "all-reduce": max(speed.all_reduce_s for speed in everyone),
    }
    shown = {name: _rate(size * _sent_share(name, evidence) / took_s) for name, took_s in seconds.items()}
    shares = (
        {name: _expected_s(name, size, rates, evidence) / took_s for name, took_s in seconds.items()} if rates else {}
    )
    told = ", ".join(
        f"{name} {shown[name]} a rank" + (f" ({shares[name]:.0%} of the profile's)" if shares else "")
        for name in seconds
    )
    found = f"{backend}, {size / 1024:,.0f} KiB: {told}"
    worst = min(shares.values(), default=1.0)
    if worst < MIN_SHARE and not is_explained:
        return [Finding("links", "FAIL", evidence.everyone, found, _advice(evidence))]
    if worst < FAIR_SHARE and not is_explained:
        return [
            Finding(
                "links", "warn", evidence.everyone, found, "the plan's step times will not hold; see papilio calibrate"
            )
        ]
    return [Finding("links", "warn" if is_explained else "ok", evidence.everyone, found)]


def _sent_share(collective: str, evidence: Evidence) -> float:
    """Bytes that a rank sends for each byte of its buffer."""
    ranks = evidence.nproc * evidence.num_hosts
    share = (ranks - 1) / ranks
    return share if collective == "all-to-all" else 2 * share


def _expected_s(collective: str, size: int, rates: Rates, evidence: Evidence) -> float:
    """Seconds by the planner's formulas (sharding/planning/cost.py), for one message of so many bytes."""
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


def _slow(evidence: Evidence, hosts: list[int], found: str) -> Finding:
    return Finding("links", "FAIL", tuple(evidence.name(host) for host in hosts), found, _advice(evidence))


def _advice(evidence: Evidence) -> str:
    if evidence.plan.device == "cuda":
        return (
            "run with NCCL_DEBUG=INFO and see which network it takes (NCCL_SOCKET_IFNAME, NCCL_IB_HCA); ibstat and "
            "ethtool show a port that is down or slow"
        )
    return "see the interface's speed there (ethtool INTERFACE), and which one gloo takes (GLOO_SOCKET_IFNAME)"


def _rates(evidence: Evidence) -> Rates | None:
    try:
        return load_hardware(_profile(evidence)).rates_of(evidence.nproc)
    except HardwareError:
        return None  # the plan says so


def _profile(evidence: Evidence) -> str:
    return evidence.hardware or evidence.plan.hardware


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:,.2f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:,.1f} MB/s"
