"""Where Slurm's programs are: installed, or fetched for the tests without root and without touching the system."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Daemons and the commands that users give.
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sacct", "scancel", "scontrol", "sinfo")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
# For a cluster that keeps accounts.
ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db")
ACCOUNTING_PACKAGES = ("slurmdbd", "mariadb-server-core", "mariadb-client-core")
HOW_TO_INSTALL = f"as root: apt-get install --no-install-recommends {' '.join(PACKAGES)}"
SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
FETCH_TIMEOUT_S = 120


class NoSlurmError(RuntimeError):
    """Slurm is not installed and could not be fetched; the message says why and how to install it."""


@dataclass(frozen=True)
class SlurmPrograms:
    """Programs of one Slurm: folders for PATH and LD_LIBRARY_PATH, and what its configuration must name.

    `plugins`, `stepd` and `root` are None where the programs find them by themselves.
    """

    folders: tuple[str, ...]
    libraries: tuple[str, ...]
    plugins: str | None
    stepd: str | None
    root: str | None

    def environment(self) -> dict[str, str]:
        """Return this process's environment, in which the programs run."""
        environment = dict(os.environ)
        environment["PATH"] = os.pathsep.join([*self.folders, environment.get("PATH", "")])
        if self.libraries:
            libraries = [*self.libraries, *filter(None, [environment.get("LD_LIBRARY_PATH")])]
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
        return environment

    def version(self) -> tuple[int, int]:
        """Return major and minor version."""
        command = ["slurmctld", "-V"]  # the others want a configuration to exist
        out = subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, timeout=30, check=True
        ).stdout
        major, minor = re.findall(r"\d+", out)[:2]
        return int(major), int(minor)


def find_slurm(cache: Path | None = None, *, with_accounting: bool = False) -> SlurmPrograms:
    """Return an installed Slurm, or one fetched into a cache folder by an earlier call or now.

    `with_accounting` asks for slurmdbd and its database, too.

    Raises:
        NoSlurmError: there is none and none could be fetched.
    """
    programs = PROGRAMS + (ACCOUNTING_PROGRAMS if with_accounting else ())
    path = os.pathsep.join([os.environ.get("PATH", ""), *SYSTEM_FOLDERS])
    found = [shutil.which(program, path=path) for program in programs]
    if all(found):
        return SlurmPrograms(tuple(dict.fromkeys(str(Path(str(name)).parent) for name in found)), (), None, None, None)
    root = (cache or Path.home() / ".cache" / "papilio_tests") / ("slurm_accounting" if with_accounting else "slurm")
    if not (root / "complete").exists():
        _fetch(root, PACKAGES + (ACCOUNTING_PACKAGES if with_accounting else ()))
    return _in_folder(root)


def _fetch(root: Path, packages: tuple[str, ...]) -> None:
    """Download the packages that are missing here and unpack them below `root`."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise NoSlurmError("Slurm is not installed, and without apt-get and dpkg it cannot be fetched; install it")
    shutil.rmtree(root, ignore_errors=True)
    downloads = root / "packages"
    downloads.mkdir(parents=True)
    plan = _run(["apt-get", "--simulate", "--no-install-recommends", "install", *packages], downloads)
    names = re.findall(r"^Inst (\S+)", plan, re.MULTILINE)
    _run(["apt-get", "download", *names], downloads)
    for package in sorted(downloads.glob("*.deb")):
        _run(["dpkg", "-x", str(package), str(root)], downloads)
    for program in (root / "usr" / "sbin").glob("*-wlm"):  # Debian's alternatives
        program.with_name(program.name.removesuffix("-wlm")).symlink_to(program.name)
    shutil.rmtree(downloads)
    (root / "complete").touch()


def _run(command: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise NoSlurmError(f"Slurm is not installed; fetching it took too long; {HOW_TO_INSTALL}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NoSlurmError(f"Slurm is not installed; `{' '.join(command[:2])}` says: {last}; {HOW_TO_INSTALL}")
    return done.stdout


def _in_folder(root: Path) -> SlurmPrograms:
    (plugins,) = {path.parent for path in root.glob("usr/lib/**/auth_munge.so")}
    return SlurmPrograms(
        folders=(str(root / "usr" / "sbin"), str(root / "usr" / "bin")),
        libraries=(str(plugins), str(plugins.parent)),
        plugins=str(plugins),
        stepd=str(root / "usr" / "sbin" / "slurmstepd"),
        root=str(root),
    )
