"""Who came, who finds whom, and through which ports."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from papilio.launch.preflight.facts import Reached
from papilio.launch.preflight.finding import MAX_NAMED, Evidence, Finding, named, or_all_well
from papilio.launch.preflight.reach import TOO_LARGE
from papilio.trainer.elastic.addresses import is_loopback

NEVER = (
    "papilio logs, or the scheduler's, show what happened on it; a host that is slow to start gets longer with --wait"
)


def check_arrival(evidence: Evidence) -> list[Finding]:
    """Did every host come, and stay?"""
    problems = [
        Finding("arrival", "FAIL", (evidence.name(index),), why, _fix_of_absence(evidence, why))
        for index, why in sorted(evidence.absent.items())
    ]
    return or_all_well("arrival", problems, evidence, lambda: _arrived(evidence))


def check_names(evidence: Evidence) -> list[Finding]:
    """Does every host resolve the name of every other one, as torch gives it to them?"""
    problems = []
    by_host: dict[tuple[int, str], list[str]] = defaultdict(list)
    nameless: dict[tuple[int, str], list[str]] = defaultdict(list)
    for source, _, facts in evidence.present:
        for reached in facts.reached:
            if reached.name_error:
                by_host[reached.host, reached.name_error].append(evidence.name(source))
            elif reached.reverse_error:
                nameless[reached.host, reached.reverse_error].append(evidence.name(source))
    for (host, error), sources in by_host.items():
        card = evidence.cards[host]
        assert card is not None
        where = named(sources, evidence.num_hosts)
        found = f"its name {card.name} {error} on {where}"
        fix = f'on {where}: echo "{card.address} {card.name}" | sudo tee -a /etc/hosts; or fix its entry in the DNS'
        problems.append(Finding("names", "FAIL", (evidence.name(host),), found, fix))
    if not problems:
        for (host, error), sources in nameless.items():
            found = f"its address {error} on {named(sources, evidence.num_hosts)}; torch warns and goes on"
            fix = "add its PTR record to the DNS, or its line to /etc/hosts there"
            problems.append(Finding("names", "warn", (evidence.name(host),), found, fix))
    return or_all_well("names", problems, evidence, lambda: _names_found(evidence))


def check_ports(evidence: Evidence) -> list[Finding]:
    """Does every host get data to every other one?"""
    failures = {
        (source, reached.host): reached
        for source, _, facts in evidence.present
        for reached in facts.reached
        if reached.port_error
    }
    problems = [
        *_too_large(evidence, failures),
        *_closed(evidence, {pair: found for pair, found in failures.items() if TOO_LARGE not in found.port_error}),
    ]
    if len(problems) > MAX_NAMED:
        ways = evidence.num_hosts * (evidence.num_hosts - 1)
        hosts = tuple(dict.fromkeys(host for problem in problems for host in problem.hosts))
        found = f"{len(failures)} of {ways} ways between hosts fail, as {problems[0].found}"
        problems = [Finding("ports", "FAIL", hosts, found, problems[0].fix)]
    return or_all_well("ports", problems, evidence, lambda: _ports_found(evidence))


def check_interfaces(evidence: Evidence) -> list[Finding]:
    """Will gloo tell the others an address of this host at which they find it?"""
    first = evidence.cards[0]
    if evidence.num_hosts == 1 or first is None or is_loopback(first.address):
        return []
    problems = []
    for index, card, facts in evidence.present:
        if is_loopback(card.gloo_address) or card.gloo_address.startswith("no "):
            interface = facts.interface or "eth0"
            found = f"gloo would tell the other hosts to find it at {card.gloo_address}, not at {card.address}"
            fix = f"export GLOO_SOCKET_IFNAME={interface} (--env GLOO_SOCKET_IFNAME={interface}); or let {card.name} "
            fix += f"resolve to {card.address} in its /etc/hosts"
            problems.append(Finding("interface", "FAIL", (evidence.name(index),), found, fix))
    return or_all_well("interface", problems, evidence, lambda: "gloo gives the others an address that they reach")


def _too_large(evidence: Evidence, failures: Mapping[tuple[int, int], Reached]) -> list[Finding]:
    """Name pairs of hosts between which only small packets pass, once for both directions."""
    problems = []
    for (source, host), found in failures.items():
        if TOO_LARGE not in found.port_error or (host < source and (host, source) in failures):
            continue
        names = evidence.name(source), evidence.name(host)
        way = f"{names[0]} to {names[1]} ({found.tried}){', and back' if (host, source) in failures else ''}"
        fix = f"give the interfaces of {names[0]} and {names[1]}, and what is between them, the same MTU: "
        fix += "ip link set dev INTERFACE mtu 1500"
        problems.append(Finding("ports", "FAIL", names, f"{way}: {found.port_error}", fix))
    return problems


def _closed(evidence: Evidence, failures: Mapping[tuple[int, int], Reached]) -> list[Finding]:
    """Name the hosts that others do not reach, or that reach no other while others do."""
    to_host: dict[tuple[int, str], list[int]] = defaultdict(list)
    for (source, host), found in failures.items():
        to_host[host, found.port_error].append(source)
    others = len(evidence.present) - 1
    lonely = {source for source, _ in failures if sum(each == source for each, _ in failures) == others > 1}
    problems = []
    for (host, error), sources in to_host.items():
        accused = sources if lonely >= set(sources) else [host]
        who, name = named([evidence.name(source) for source in sources], evidence.num_hosts), evidence.name(host)
        way = f"{who} to {name} ({failures[sources[0], host].tried}): {error}"
        fix = (
            f"let TCP pass from {who} to {name}, at all ports from 1024 on (firewall or security group): torch and "
            "NCCL take any that is free"
        )
        problems.append(Finding("ports", "FAIL", tuple(evidence.name(each) for each in accused), way, fix))
    return problems


def _fix_of_absence(evidence: Evidence, why: str) -> str:
    head, _, port = evidence.endpoint.rpartition(":")
    if "does not resolve" in why:
        return f'there: echo "ADDRESS {head}" | sudo tee -a /etc/hosts, with the address of {head}; or fix the DNS'
    if "does not reach" in why:
        fix = f"let TCP pass from there to port {port} of {head} (firewall or security group), or choose another port"
        return f"{fix}: --rdzv-port"
    if "fell silent" in why:
        return "look at its log: it was ended, or its network was lost"
    return NEVER


def _arrived(evidence: Evidence) -> str:
    if evidence.num_hosts == 1:
        return "a job of one host"
    names = evidence.everyone
    shown = ", ".join(names) if len(names) <= 2 * MAX_NAMED else f"{names[0]} to {names[-1]}"
    return f"{shown} met at {evidence.endpoint} within {evidence.arrived_s:.1f} s"


def _names_found(evidence: Evidence) -> str:
    return "none to resolve" if evidence.num_hosts == 1 else "every host resolves every other one, both ways"


def _ports_found(evidence: Evidence) -> str:
    if evidence.num_hosts == 1:
        return "none between hosts"
    pairs = evidence.num_hosts * (evidence.num_hosts - 1)
    return f"rendezvous and data ports let data through, {pairs} ways"
