"""The versions of torch, fbgemm and torchrec that belong together; read by `papilio doctor` and by the Makefile.

Run as a script, on any Python 3.11 and with nothing installed, it prints what pip should install:
`python launch/version_set.py cpu` prints the requirements, with --no-deps those that pip must take
without their dependencies (torchrec asks for the CUDA fbgemm-gpu on every machine).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

FBGEMM_OF_DEVICE = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}
# What torchrec imports beside the version set; these need torch themselves, so they are installed with it.
TORCHREC_NEEDS = ("tensordict>=0.8", "torchmetrics==1.0.3")


@dataclass(frozen=True)
class VersionSet:
    """Three releases built for each other; fbgemm's binaries fit one release of torch only."""

    torch: str
    fbgemm: str
    torchrec: str

    def __str__(self) -> str:
        return f"torch {self.torch} + fbgemm {self.fbgemm} + torchrec {self.torchrec}"

    def requirements(self, device: str) -> list[str]:
        """What pip installs with dependencies, for `device` "cpu" or "cuda"."""
        return [f"torch=={self.torch}", f"{FBGEMM_OF_DEVICE[device]}=={self.fbgemm}", *TORCHREC_NEEDS]

    def requirements_without_dependencies(self) -> list[str]:
        """What pip must install with `--no-deps`."""
        return [f"torchrec=={self.torchrec}"]


# The first is the one installed by default.
VERSION_SETS = (VersionSet("2.13.0", "1.8.0", "1.8.0"), VersionSet("2.11.0", "1.6.0", "1.6.1"))


def main() -> None:
    """Print the requirements of one version set on one line, for pip."""
    parser = argparse.ArgumentParser(description="print what pip should install")
    parser.add_argument("device", choices=sorted(FBGEMM_OF_DEVICE))
    parser.add_argument(
        "--torch", choices=[version_set.torch for version_set in VERSION_SETS], default=VERSION_SETS[0].torch
    )
    parser.add_argument("--no-deps", action="store_true", help="print those that need pip's --no-deps")
    arguments = parser.parse_args()
    version_set = next(version_set for version_set in VERSION_SETS if version_set.torch == arguments.torch)
    print(
        *(
            version_set.requirements_without_dependencies()
            if arguments.no_deps
            else version_set.requirements(arguments.device)
        )
    )


if __name__ == "__main__":
    main()
