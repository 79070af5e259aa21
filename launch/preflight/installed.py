"""What is installed on a host: versions, and a hash of the files themselves, since versions can lie."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

# Those of papilio, each with a hash of its own, so that a report names the one that differs.
PACKAGES = ("data_pipeline", "launch", "sharding", "trainer")
# What decides numbers, formats or messages between ranks.
DISTRIBUTIONS = (
    "papilio",
    "torch",
    "torchrec",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "torchx-nightly",
    "numpy",
    "pyarrow",
    "tensordict",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
HASHED = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")
SUFFIXES = (".py", ".toml")
DIGITS = 12


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of what is installed of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_hashes() -> dict[str, str]:
    """Return a hash of the files of each of our packages, and of the lists of files of the version set's wheels."""
    home = Path(__file__).absolute().parents[2]  # not its real path: a checkout links its folders into the package
    found = {name: folder_hash(home / name) for name in PACKAGES}
    for name in HASHED:
        try:
            record = metadata.distribution(name).read_text("RECORD")
        except metadata.PackageNotFoundError:
            continue
        if record:
            found[name] = _record_hash(record)
    return found


def folder_hash(folder: Path) -> str:
    """Hash names and contents of the Python and TOML files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:DIGITS]


def _record_hash(record: str) -> str:
    """Hash what a wheel came with: an installer adds lines of its own, which name the place or have no hash."""
    lines = sorted(line for line in record.splitlines() if ",sha256=" in line and not line.startswith(".."))
    shipped = [line for line in lines if ".dist-info/" not in line]
    return hashlib.sha256("\n".join(shipped).encode()).hexdigest()[:DIGITS]
