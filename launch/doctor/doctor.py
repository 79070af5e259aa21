"""`papilio doctor`: judges an installation and gives, for each finding, the command that fixes it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from typing import Literal

from papilio.data_pipeline.terminal import table_columns
from papilio.launch.doctor.installation import Installation, inspect_installation
from papilio.launch.version_set import VERSION_SETS, VersionSet

Status = Literal["ok", "warn", "FAIL"]
MIN_PYTHON = (3, 11)
GIB = 1 << 30
# The quick start's two ranks use about 2 GiB each with the framework; below this they would swap.
MIN_MEMORY_BYTES = 6 * GIB
# Worker processes of data loading and NCCL's local transport pass data through shared memory; containers give 64 MiB.
MIN_SHARED_MEMORY_BYTES = GIB
# (distribution, why it is needed); the version set and TorchX have checks of their own.
NEEDED_PACKAGES = ("numpy", "pyarrow", "pydantic", "iopath", "zstandard", "tensorboard")
TORCHREC_PACKAGES = ("tensordict", "torchmetrics", "pyre-extensions", "tqdm")


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report. `fix` is a command or an advice, empty when all is well."""

    name: str
    status: Status
    found: str
    fix: str = ""


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 1 when a check fails, else 0."""
    checks = diagnose(inspect_installation())
    print(json.dumps([dataclasses.asdict(check) for check in checks], indent=1) if arguments.json else report(checks))
    return int(any(check.status == "FAIL" for check in checks))


def diagnose(installation: Installation) -> list[Check]:
    """All checks, in the order in which fixes should be made."""
    return [
        _check_python(installation),
        _check_version_set(installation),
        _check_device_match(installation),
        _check_loading(installation),
        _check_operators(installation),
        _check_packages(installation),
        _check_torchx(installation),
        _check_gpu(installation),
        _check_communication(installation),
        _check_torchrun(installation),
        _check_machine(installation),
        _check_shared_memory(installation),
    ]


def report(checks: list[Check]) -> str:
    """The checks as a table, each fix below its check, and a verdict."""
    width = max(len(check.name) for check in checks)
    indent = " " * (width + 8)
    num_columns = table_columns()
    lines = []
    for check in checks:
        head = f"{check.status:4}  {check.name:{width}}  "
        lines += textwrap.wrap(check.found, num_columns, initial_indent=head, subsequent_indent=indent)
        lines += [f"{indent}fix: {line}" for line in check.fix.splitlines()]
    num_failed = sum(check.status == "FAIL" for check in checks)
    num_warnings = sum(check.status == "warn" for check in checks)
    warned = f" ({num_warnings} {'warning' if num_warnings == 1 else 'warnings'})" if num_warnings else ""
    verdict = f"{num_failed} of {len(checks)} checks failed" if num_failed else f"this installation is sound{warned}"
    return "\n".join([*lines, "", verdict])


def _check_python(installation: Installation) -> Check:
    version = ".".join(map(str, installation.python))
    if installation.python[:2] < MIN_PYTHON:
        return Check("python", "FAIL", f"{version}, needs 3.11 or newer", "make env PYTHON=/path/to/python3.11")
    return Check("python", "ok", version)


def _check_version_set(installation: Installation) -> Check:
    versions = installation.versions
    fbgemm = versions["fbgemm-gpu"] or versions["fbgemm-gpu-cpu"]
    # A local version label ("2.13.0+cpu") says how it was built, not which release it is.
    found = tuple(
        (version or "none").partition("+")[0] for version in (versions["torch"], fbgemm, versions["torchrec"])
    )
    shown = f"torch {versions['torch']}, fbgemm {fbgemm}, torchrec {versions['torchrec']}"
    if found in [dataclasses.astuple(version_set) for version_set in VERSION_SETS]:
        return Check("version set", "ok", shown)
    supported = " or ".join(map(str, VERSION_SETS))
    return Check(
        "version set",
        "FAIL",
        f"{shown}: not one of the supported version sets, {supported}",
        _install_version_set(installation),
    )


def _check_device_match(installation: Installation) -> Check:
    name = "fbgemm build"
    has_cpu, has_cuda = (installation.versions[name] is not None for name in ("fbgemm-gpu-cpu", "fbgemm-gpu"))
    cuda = installation.probe.torch_cuda
    version_set = _nearest_version_set(installation)
    if has_cpu and has_cuda:
        both = "both fbgemm-gpu and fbgemm-gpu-cpu are installed; they overwrite each other's files"
        uninstall = "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu"
        fitting = "fbgemm-gpu" if cuda else "fbgemm-gpu-cpu"
        return Check(name, "FAIL", both, f"{uninstall} && pip install {fitting}=={version_set.fbgemm}")
    if has_cpu and cuda:
        found = f"fbgemm is the CPU build, torch is built for CUDA {cuda}"
        fix = f"pip uninstall -y fbgemm-gpu-cpu && pip install fbgemm-gpu=={version_set.fbgemm}"
        if installation.gpus:
            return Check(name, "FAIL", found, fix)
        # What many package indexes give: their only torch for Linux is the CUDA build.
        return Check(name, "warn", f"{found}; it works here, where there is no GPU", f"once there is one: {fix}")
    if has_cuda and installation.probe.torch_loads and not cuda:
        found = "fbgemm is the CUDA build, torch is built for CPU only (plain `pip install torchrec` does this)"
        fix = f"pip uninstall -y fbgemm-gpu && pip install fbgemm-gpu-cpu=={version_set.fbgemm}"
        return Check(name, "FAIL", found, fix)
    if not has_cpu and not has_cuda:
        return Check(name, "FAIL", "fbgemm is not installed", _install_version_set(installation))
    return Check(name, "ok", f"CUDA {cuda}, as torch" if cuda else "CPU, as torch")


def _check_loading(installation: Installation) -> Check:
    probe = installation.probe
    if probe.torchrec_loads:
        return Check("loading", "ok", "torch, fbgemm and torchrec load")
    culprit = "torchrec" if probe.fbgemm_loads else "torch or fbgemm"
    found = f"{culprit} does not load: {probe.error}"
    is_mixed = _check_device_match(installation).status == "FAIL"
    fix = "fix the fbgemm build first" if is_mixed else _install_version_set(installation, force=True)
    return Check("loading", "FAIL", found, fix)


def _check_operators(installation: Installation) -> Check:
    probe = installation.probe
    if not probe.fbgemm_loads:
        return Check("operators", "FAIL", "unknown, as fbgemm does not load", "fix the loading first")
    if probe.missing_operators:
        missing = ", ".join(probe.missing_operators)
        return Check("operators", "FAIL", f"fbgemm lacks {missing}", _install_version_set(installation, force=True))
    return Check("operators", "ok", "fbgemm has all that a step calls")


def _check_packages(installation: Installation) -> Check:
    wanted = (*NEEDED_PACKAGES, *TORCHREC_PACKAGES)
    missing = [name for name in wanted if installation.versions[name] is None]
    if missing:
        requirements = " ".join("torchmetrics==1.0.3" if name == "torchmetrics" else name for name in missing)
        return Check("packages", "FAIL", f"not installed: {', '.join(missing)}", f"pip install {requirements}")
    return Check("packages", "ok", ", ".join(f"{name} {installation.versions[name]}" for name in wanted))


def _check_torchx(installation: Installation) -> Check:
    nightly, stable = installation.versions["torchx-nightly"], installation.versions["torchx"]
    if nightly and stable:
        found = f"both torchx {stable} and torchx-nightly {nightly} are installed; they overwrite each other's files"
        fix = f"pip uninstall -y torchx torchx-nightly && pip install torchx-nightly=={nightly}"
        return Check("torchx", "FAIL", found, fix)
    if nightly is None:
        found = f"torchx {stable} is installed; Papilio uses torchx-nightly" if stable else "not installed"
        uninstall = "pip uninstall -y torchx && " if stable else ""
        return Check("torchx", "FAIL", found, f"{uninstall}pip install torchx-nightly==2026.10.26")
    return Check("torchx", "ok", f"nightly {nightly}")


def _check_gpu(installation: Installation) -> Check:
    if not installation.gpus:
        return Check("gpu", "ok", "none; training runs on the CPU")
    shown = f"{len(installation.gpus)} with driver {installation.driver}"
    if installation.probe.torch_cuda is None:
        return Check("gpu", "warn", f"{shown}, but torch is built for CPU only", "make env DEVICE=cuda")
    if installation.probe.num_visible_gpus < len(installation.gpus):
        found = f"{shown}; torch sees {installation.probe.num_visible_gpus} of them"
        return Check(
            "gpu", "warn", found, "look at CUDA_VISIBLE_DEVICES, and whether the driver is new enough for CUDA"
        )
    return Check("gpu", "ok", shown)


def _check_communication(installation: Installation) -> Check:
    probe = installation.probe
    backends = [name for name, is_there in (("gloo", probe.has_gloo), ("NCCL", probe.has_nccl)) if is_there]
    needed_is_there = probe.has_nccl if installation.gpus and probe.torch_cuda else probe.has_gloo
    if not needed_is_there:
        found = f"torch was built with {', '.join(backends) or 'neither gloo nor NCCL'}"
        return Check("communication", "FAIL", found, _install_version_set(installation, force=True))
    return Check("communication", "ok", ", ".join(backends))


def _check_torchrun(installation: Installation) -> Check:
    if installation.torchrun is None:
        found = "torchrun is not on PATH; our components do not need it, torchx's own (dist.torchrun) do"
        return Check("torchrun", "warn", found, f'export PATH="{installation.bin_folder}:$PATH"')
    return Check("torchrun", "ok", installation.torchrun)


def _check_machine(installation: Installation) -> Check:
    found = f"{installation.num_cores} cores, {installation.memory_bytes / GIB:.1f} GiB of memory"
    if installation.memory_bytes < MIN_MEMORY_BYTES:
        return Check("machine", "warn", found, "two ranks want 6 GiB: run fewer (--nproc 1) or smaller tables")
    return Check("machine", "ok", found)


def _check_shared_memory(installation: Installation) -> Check:
    found = f"/dev/shm has {installation.shared_memory_bytes / GIB:.2f} GiB"
    if installation.shared_memory_bytes < MIN_SHARED_MEMORY_BYTES:
        fix = "in a container: docker run --shm-size=8g; else: mount -o remount,size=8G /dev/shm"
        return Check("shared memory", "warn", found, fix)
    return Check("shared memory", "ok", found)


def _nearest_version_set(installation: Installation) -> VersionSet:
    torch = (installation.versions["torch"] or "").partition("+")[0]
    return next((version_set for version_set in VERSION_SETS if version_set.torch == torch), VERSION_SETS[0])


def _install_version_set(installation: Installation, *, force: bool = False) -> str:
    version_set = _nearest_version_set(installation)
    has_cpu, has_cuda = (installation.versions[name] is not None for name in ("fbgemm-gpu-cpu", "fbgemm-gpu"))
    wants_cuda = bool(installation.gpus) or (installation.probe.torch_cuda is not None and not has_cpu)
    torch, fbgemm, *_ = version_set.requirements("cuda" if wants_cuda else "cpu")
    other = "fbgemm-gpu-cpu" if wants_cuda else "fbgemm-gpu"
    remove = f"pip uninstall -y {other} && " if (has_cpu if wants_cuda else has_cuda) else ""
    torchrec = " ".join(version_set.requirements_without_dependencies())
    again = " --force-reinstall" if force else ""
    return f"{remove}pip install{again} {torch} {fbgemm} && pip install{again} --no-deps {torchrec}"
