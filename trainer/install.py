"""Are the packages that run ours? Their import names are generic, so another project's can stand before them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGES = ("data_pipeline", "sharding", "trainer", "launch", "benchmarks")


class InstallError(ValueError):
    """Our packages do not come from one place."""


def check_install() -> None:
    """Check that every package comes from the folder that holds this one.

    Raises:
        InstallError: a package is missing or comes from elsewhere; the message names the intruder's path.
    """
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise InstallError(f"package {name} of Papilio is missing beside {home}; install Papilio again")
        found = Path(spec.origin).resolve().parent
        if found.parent != home:
            raise InstallError(
                f"package {name} comes from {found}, not from {home}; run from another folder, or use an environment "
                f"of Papilio's own, so that nothing else named {name} stands before it on sys.path"
            )
