"""The versions of what a run is made with."""

from __future__ import annotations

import sys
from importlib import metadata

import torch

VERSIONED_PACKAGES = (
    "papilio",
    "torch",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "torchrec",
    "torchx-nightly",
    "numpy",
    "pyarrow",
)


def package_versions() -> dict[str, str]:
    """Return the versions of what a run is made with."""
    versions = {"python": sys.version.split()[0]}
    for package in VERSIONED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions
