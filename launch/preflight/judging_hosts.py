"""Are the hosts alike, and are they what the plan takes them for?"""

from __future__ import annotations

import statistics

from papilio.launch.preflight.facts import Gpu, HostFacts
from papilio.launch.preflight.finding import Evidence, Finding, Status, odd_ones_out, or_all_well
from papilio.launch.preflight.installed import PACKAGES
from papilio.sharding.hardware import Hardware, HardwareError, load_hardware
from papilio.sharding.reports.figures import size
from papilio.trainer.checkpoint.compatibility import cut

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

Problem = tuple[Status, str, str]


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
