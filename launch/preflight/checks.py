"""The checks of a preflight, each a question with its fix, in the order in which fixes should be made."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping

from papilio.launch.preflight.facts import DataFacts, Gpu, HostFacts, Reached
from papilio.launch.preflight.finding import MAX_NAMED, Evidence, Finding, Status, named, odd_ones_out, or_all_well
from papilio.launch.preflight.installed import PACKAGES
from papilio.launch.preflight.link_checks import check_links
from papilio.launch.preflight.reach import TOO_LARGE
from papilio.sharding.hardware import Hardware, HardwareError, load_hardware
from papilio.sharding.reports.figures import size
from papilio.trainer.checkpoint.compatibility import cut
from papilio.trainer.elastic.addresses import is_loopback

GIB = 1 << 30
MAX_SETTINGS = 5
# Heartbeats and first failures are compared by their times, and S3 refuses signatures that are off by minutes.
MAX_CLOCK_DIFFERENCE_S = 1.0
# Of a GPU's memory, what a driver, a display and a forgotten shell may hold.
MAX_USED_BYTES = 1 << 30
HOT_CELSIUS = 85
# NCCL's local transport passes data through shared memory; containers give 64 MiB.
MIN_SHARED_MEMORY_BYTES = GIB
# A device's memory is sold in round figures of which the driver keeps some.
REAL_SHARE = 0.9
# Metrics, TensorBoard's events, the report, logs.
RUN_FOLDER_BYTES = GIB
NEVER = (
    "papilio logs, or the scheduler's, show what happened on it; a host that is slow to start gets longer with --wait"
)

Problem = tuple[Status, str, str]


def judge(evidence: Evidence) -> list[Finding]:
    """Return what every check found."""
    checks = (
        check_arrival,
        check_names,
        check_ports,
        check_interfaces,
        check_clocks,
        check_versions,
        check_code,
        check_settings,
        check_gpus,
        check_memory,
        check_folders,
        check_room,
        check_data,
        check_plan,
        check_links,
    )
    return [finding for check in checks for finding in check(evidence)]


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


def check_clocks(evidence: Evidence) -> list[Finding]:
    """Do the clocks agree? The time of most hosts counts."""
    ahead = {index: facts.clock_ahead_s for index, _, facts in evidence.present}
    usual = statistics.median_low(ahead.values())
    problems, most = [], 0.0
    for index, _, facts in evidence.present:
        off_s = facts.clock_ahead_s - usual
        most = max(most, abs(off_s))
        if abs(off_s) > MAX_CLOCK_DIFFERENCE_S + facts.clock_error_s:
            where = "ahead of" if off_s > 0 else "behind"
            found = f"its clock is {abs(off_s):.1f} s {where} the others'; allowed is {MAX_CLOCK_DIFFERENCE_S:g} s"
            fix = "there: sudo chronyc makestep (or: sudo systemctl restart systemd-timesyncd)"
            problems.append(Finding("clocks", "FAIL", (evidence.name(index),), found, fix))
    return or_all_well("clocks", problems, evidence, lambda: f"agree within {max(most, 1e-3) * 1000:.0f} ms")


def check_versions(evidence: Evidence) -> list[Finding]:
    """Is the same installed everywhere?"""
    keys = dict.fromkeys(key for *_, facts in evidence.present for key in facts.versions)
    problems = []
    for key in keys:
        values = {evidence.name(index): facts.versions.get(key, "none") for index, _, facts in evidence.present}
        usual, odd = odd_ones_out(values)
        for host, value in odd.items():
            found = f"{key} {value}, elsewhere {usual}" if value != "none" else f"no {key}, elsewhere {usual}"
            problems.append(Finding("versions", "FAIL", (host,), found, _install(key, usual, value)))
    first = evidence.present[0][2].versions
    shown = [f"{key} {first[key]}" for key in ("python", "papilio", "torch", "torchrec") if key in first]
    fbgemm = [f"fbgemm {version}" for key, version in first.items() if key.startswith("fbgemm")]
    return or_all_well("versions", problems, evidence, lambda: ", ".join(shown + fbgemm))


def check_code(evidence: Evidence) -> list[Finding]:
    """Are the installed files the same, beyond their versions?"""
    problems = []
    for key in dict.fromkeys(key for *_, facts in evidence.present for key in facts.code):
        values = {evidence.name(index): facts.code.get(key, "none") for index, _, facts in evidence.present}
        usual, odd = odd_ones_out(values)
        for host, value in odd.items():
            if key in PACKAGES:
                found = f"package {key} has other files ({value}) than elsewhere ({usual})"
                fix = "bring the same checkout or wheel there, or run all hosts from one shared folder"
            else:
                found = f"{key} is another build ({value}) than elsewhere ({usual})"
                fix = f"install {key} there from the same index: pip install --force-reinstall --no-deps {key}==VERSION"
            problems.append(Finding("code", "FAIL", (host,), found, fix))
    return or_all_well("code", problems, evidence, lambda: "the files of papilio and of the version set are the same")


def check_settings(evidence: Evidence) -> list[Finding]:
    """Is what the recipe says the same everywhere? Under the same path may lie another file."""
    problems = []
    for key in dict.fromkeys(key for *_, facts in evidence.present for key in facts.settings):
        values = {evidence.name(index): facts.settings.get(key, "nothing") for index, _, facts in evidence.present}
        usual, odd = odd_ones_out(values)
        for host, value in odd.items():
            found = f"{key} = {cut(value)} there, elsewhere {cut(usual)}"
            problems.append(Finding("recipe", "FAIL", (host,), found, "bring the same recipe file to all hosts"))
    shown = problems[:MAX_SETTINGS]
    if len(problems) > len(shown):
        found = f"and {len(problems) - len(shown)} more settings differ"
        shown.append(Finding("recipe", "FAIL", (), found, "bring the same recipe file to all hosts"))
    return or_all_well("recipe", shown, evidence, lambda: "all hosts read the same settings")


def check_gpus(evidence: Evidence) -> list[Finding]:
    """Are there as many GPUs as ranks, of one kind, well, and unused?"""
    wants_gpus = evidence.plan.device == "cuda"
    problems: list[Finding] = []
    for index, _, facts in evidence.present:
        problems += [
            Finding("gpus", status, (evidence.name(index),), found, fix)
            for status, found, fix in _gpu_problems(facts, evidence, wants_gpus=wants_gpus)
        ]
    kinds = {evidence.name(index): _kind(facts) for index, _, facts in evidence.present}
    usual, odd = odd_ones_out(kinds)
    problems += [
        Finding("gpus", "FAIL", (host,), f"{kind}, elsewhere {usual}", "give the job hosts of one kind")
        for host, kind in odd.items()
    ]
    return or_all_well("gpus", problems, evidence, lambda: f"{usual}{_driver(evidence)}")


def check_memory(evidence: Evidence) -> list[Finding]:
    """Does the plan fit the memory that the hosts really have?"""
    problems = []
    for index, _, facts in evidence.present:
        host = evidence.name(index)
        needed = _needed_bytes(evidence, index)
        if needed > facts.memory_bytes:
            found = f"{size(facts.memory_bytes)} of memory; the plan puts {size(needed)} there"
            fix = "name a profile that fits it (--host; papilio calibrate makes one), or take more or larger hosts"
            problems.append(Finding("memory", "FAIL", (host,), found, fix))
        if evidence.nproc > 1 and facts.shared_memory_bytes < MIN_SHARED_MEMORY_BYTES:
            found = f"/dev/shm has {size(facts.shared_memory_bytes)}, through which ranks of a host pass data"
            fix = "there: mount -o remount,size=8G /dev/shm; in a container: docker run --shm-size=8g"
            problems.append(Finding("memory", "warn", (host,), found, fix))
    least = min(facts.memory_bytes for *_, facts in evidence.present)
    needed = max(_needed_bytes(evidence, index) for index, *_ in evidence.present)
    return or_all_well("memory", problems, evidence, lambda: f"{size(least)} or more a host; {size(needed)} planned")


def _install(key: str, usual: str, value: str) -> str:
    if key == "python":
        return f"run the same interpreter there (--python), or install Python {usual}"
    if key == "papilio":
        return "bring the same checkout or wheel there, or run all hosts from one shared folder"
    if usual == "none":
        return f"there: pip uninstall {key}"
    return f"there: pip install --no-deps {key}=={usual}" if value else ""


def _gpu_problems(facts: HostFacts, evidence: Evidence, *, wants_gpus: bool) -> list[Problem]:
    if facts.gpu_error:
        return [("FAIL", facts.gpu_error, "there: fix the driver (dmesg | grep -i nvrm), or take the host out")]
    if wants_gpus and len(facts.gpus) < evidence.nproc:
        found = f"{len(facts.gpus)} GPUs for {evidence.nproc} ranks"
        return [("FAIL", found, f"--nproc {len(facts.gpus)}; or see why the scheduler or the driver hides some")]
    if not wants_gpus and facts.gpus and evidence.plan.device:
        found = f"{len(facts.gpus)} GPUs, which training would use, but the plan is for {evidence.plan.hardware}"
        return [("warn", found, "name the hosts' profile with --host")]
    hardware = _hardware(evidence)
    return [problem for gpu in facts.gpus[: evidence.nproc] for problem in _one_gpu(gpu, hardware)]


def _one_gpu(gpu: Gpu, hardware: Hardware | None) -> list[Problem]:
    problems: list[Problem] = []
    number = f"GPU {gpu.index}"
    if gpu.uncorrected_errors:
        found = f"{number} has {gpu.uncorrected_errors} uncorrected memory errors"
        problems.append(("FAIL", found, f"there: nvidia-smi --gpu-reset -i {gpu.index}, or take the host out"))
    if gpu.used_bytes > MAX_USED_BYTES:
        found = f"{number} is in use: {size(gpu.used_bytes)} of {size(gpu.memory_bytes)}"
        problems.append(("FAIL", found, f"there: nvidia-smi -i {gpu.index} names the processes; end them"))
    if gpu.is_slowed or (gpu.celsius or 0) >= HOT_CELSIUS:
        found = f"{number} is slowed down by its hardware, at {gpu.celsius} °C"
        problems.append(("warn", found, "look at its cooling and power: nvidia-smi -q -d PERFORMANCE"))
    if hardware is not None and hardware.device == "cuda" and gpu.memory_bytes < REAL_SHARE * hardware.device_memory.si:
        found = f"{number}, {gpu.name}, has {size(gpu.memory_bytes)}; profile {hardware.name} has more"
        problems.append(("FAIL", found, "name the hosts' own profile with --host"))
    return problems


def _hardware(evidence: Evidence) -> Hardware | None:
    try:
        return load_hardware(evidence.hardware or evidence.plan.hardware)
    except HardwareError:
        return None  # the plan says so


def _kind(facts: HostFacts) -> str:
    names = {gpu.name for gpu in facts.gpus}
    return f"{len(facts.gpus)} x {', '.join(sorted(names))}" if names else "none"


def _driver(evidence: Evidence) -> str:
    drivers = {facts.driver for *_, facts in evidence.present if facts.driver}
    return f", driver {', '.join(sorted(drivers))}" if drivers else "; ranks run on the CPU"


def _needed_bytes(evidence: Evidence, index: int) -> int:
    """Bytes of the host's memory that the plan fills on one host."""
    plan = evidence.plan
    if not plan.rank_device_bytes:
        return 0
    ranks = [rank % len(plan.rank_device_bytes) for rank in range(index * evidence.nproc, (index + 1) * evidence.nproc)]
    needed = sum(plan.rank_host_bytes[rank] for rank in ranks)
    return needed + (sum(plan.rank_device_bytes[rank] for rank in ranks) if plan.device == "cpu" else 0)


def check_folders(evidence: Evidence) -> list[Finding]:
    """Does every host write to the run's folders, and are these the same for all?"""
    problems = [
        Finding("run folder", "FAIL", (evidence.name(index),), found, fix)
        for index, _, facts in evidence.present
        for folder in facts.folders
        if folder.error
        for found, fix in [_split(folder.error, "choose another folder")]
    ]
    paths = [folder.path for folder in evidence.present[0][2].folders]
    for position in range(len(paths)):
        problems += _strangers(evidence, position)
    shared = " and is the same on all hosts" if evidence.num_hosts > 1 else ""
    return or_all_well("run folder", problems, evidence, lambda: f"{' and '.join(paths)} can be written{shared}")


def _strangers(evidence: Evidence, position: int) -> list[Finding]:
    """Name the hosts on which a folder does not show what the others wrote to theirs."""
    wrote = [(index, card, facts.folders[position]) for index, card, facts in evidence.present]
    wrote = [(index, card, folder) for index, card, folder in wrote if not folder.error]
    unseen = {
        evidence.name(index): [evidence.name(other) for other, card, _ in wrote if card.token not in folder.marks]
        for index, _, folder in wrote
    }
    unseen = {host: others for host, others in unseen.items() if others}
    fix = "put it on a file system that all hosts mount: --output.runs_dir=/shared/runs"
    fix += "; or checkpoints on S3: --checkpoint.folder=s3://bucket/prefix"
    if len(unseen) > 2 and all(len(others) == len(wrote) - 1 for others in unseen.values()):
        found = f"{wrote[0][2].path} is another folder on every host"
        return [Finding("run folder", "FAIL", tuple(unseen), found, fix)]
    path = {evidence.name(index): folder.path for index, _, folder in wrote}
    return [
        Finding(
            "run folder",
            "FAIL",
            (host,),
            f"{path[host]} there does not show what {named(others, evidence.num_hosts)} wrote to theirs",
            fix,
        )
        for host, others in unseen.items()
    ]


def _split(problem: str, otherwise: str) -> tuple[str, str]:
    """Part what was found from its fix, which follows the last semicolon of our messages."""
    found, _, fix = problem.rpartition("; ")
    return (found, f"{fix} (--output.runs_dir)") if found else (problem, f"{otherwise}: --output.runs_dir=DIR")


def check_room(evidence: Evidence) -> list[Finding]:
    """Will the checkpoints fit?"""
    config = evidence.config.checkpoint
    num_kept = config.keep_last + 1 + int(config.keep_best)
    needed = num_kept * evidence.plan.model_bytes
    problems, told = [], []
    for index, _, facts in evidence.present:
        for folder in facts.folders:
            holds_checkpoints = config.folder is None or folder.path == config.folder
            wanted = max(needed if holds_checkpoints else 0, RUN_FOLDER_BYTES)
            if folder.error or folder.free_bytes is None:
                continue
            told.append(folder.free_bytes)
            if folder.free_bytes < wanted:
                found = f"{size(folder.free_bytes)} free in {folder.path}; {size(wanted)} are needed"
                if wanted == needed:
                    found += f", for {num_kept} checkpoints of {size(evidence.plan.model_bytes)}"
                fix = "free some, or choose another disk: --output.runs_dir=DIR, --checkpoint.folder=s3://bucket/prefix"
                problems.append(Finding("room", "FAIL", (evidence.name(index),), found, fix))
    say = f"{size(min(told))} free, {size(max(needed, RUN_FOLDER_BYTES))} needed" if told else "not known here"
    return or_all_well("room", problems, evidence, lambda: say)


def check_data(evidence: Evidence) -> list[Finding]:
    """Does every host read the same whole data set?"""
    problems = []
    for index, _, facts in evidence.present:
        for problem in facts.data.problems:
            found, _, fix = problem.rpartition("; ")
            problems.append(Finding("data", "FAIL", (evidence.name(index),), found or problem, fix if found else ""))
    manifests = {facts.data.manifest_crc32 for *_, facts in evidence.present} - {None}
    if not problems and len(manifests) > 1:
        first = evidence.present[0][2].data.manifest_crc32
        problems = [
            Finding(
                "data",
                "FAIL",
                (evidence.name(index),),
                f"{facts.data.path} there is another data set than on {evidence.name(0)}: their manifests differ",
                "copy the data set anew, or read it from one shared place: --data.path",
            )
            for index, _, facts in evidence.present
            if facts.data.manifest_crc32 != first
        ]
    return or_all_well("data", problems, evidence, lambda: _data_found([facts.data for *_, facts in evidence.present]))


def _data_found(data: list[DataFacts]) -> str:
    checked = set().union(*(each.checked_shards for each in data))
    first = data[0]
    total = f"{first.num_shards:,} shards of {size(first.num_bytes)}"
    if all(len(each.checked_shards) == each.num_shards for each in data):
        return f"{first.path}: {total}, every checksum right on every host"
    return f"{first.path}: {total}, all there; {len(checked):,} of them read and right (--read-gib reads more)"


def check_plan(evidence: Evidence) -> list[Finding]:
    """Is there a plan that fits the machines of the profile?"""
    plan = evidence.plan
    if plan.error:
        return [Finding("plan", "FAIL", (), plan.error, "papilio plan explains; its --explain TABLE shows each option")]
    most = max(plan.rank_device_bytes, default=0) / (1 << 30)
    return [
        Finding(
            "plan",
            "ok",
            (),
            f"fits {plan.num_ranks} ranks on {plan.hardware}: {most:.2f} GiB on the fullest rank, "
            f"{plan.samples_per_s:,.0f} samples/s expected",
        )
    ]
