"""The real `torchx` command, which finds Papilio as if it had been installed from this checkout."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def run_torchx(
    *words: str,
    cwd: Path | None = None,
    with_entry_points: bool = True,
    environment: Mapping[str, str] = os.environ,
    first: Sequence[Path] = (),
    place: Callable[[list[str]], list[str]] = list,
) -> subprocess.CompletedProcess[str]:
    """Run `torchx` with the entry points that setup.cfg names, or none; in an empty folder, if no other is given.

    `first` are folders that PYTHONPATH names before all others. `place` makes of the command one that runs it
    elsewhere.
    """
    with tempfile.TemporaryDirectory() as folder:
        _write_information(Path(folder, "site"), with_entry_points)
        path = [*first, Path(folder, "site"), REPOSITORY]
        own = {**environment, "PYTHONPATH": os.pathsep.join(map(str, path))}
        command = [str(Path(sys.executable).with_name("torchx")), "--log_level", "ERROR", *words]
        return subprocess.run(
            place(command), capture_output=True, text=True, env=own, cwd=cwd or folder, timeout=120, check=False
        )


def _write_information(site: Path, with_entry_points: bool) -> None:
    """Write what a package's installation leaves; being found first, it hides that of an installed Papilio."""
    information = site / "papilio-0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: papilio\nVersion: 0\n")
    if with_entry_points:
        (information / "entry_points.txt").write_text(_entry_points())


def _entry_points() -> str:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg", "utf-8")
    # In the order of setuptools, by name.
    return "\n".join(
        "\n".join([f"[{group}]", *sorted(entries.split("\n")[1:])])
        for group, entries in setup["options.entry_points"].items()
    )
