"""The real `torchx` command, which finds Papilio as if it had been installed from this checkout."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def run_torchx(
    *words: str,
    cwd: Path | None = None,
    with_entry_points: bool = True,
    environment: Mapping[str, str] = os.environ,
    place: Callable[[list[str]], list[str]] = list,
) -> subprocess.CompletedProcess[str]:
    """Run `torchx` with the entry points that setup.cfg names; in an empty folder, if no other is given.

    `place` makes of the command one that runs it elsewhere.
    """
    with tempfile.TemporaryDirectory() as folder:
        if with_entry_points:
            _write_entry_points(Path(folder, "site"))
        own = {**environment, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(Path(folder, "site"))])}
        command = [str(Path(sys.executable).with_name("torchx")), "--log_level", "ERROR", *words]
        return subprocess.run(
            place(command), capture_output=True, text=True, env=own, cwd=cwd or folder, timeout=120, check=False
        )


def _write_entry_points(site: Path) -> None:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg", "utf-8")
    information = site / "papilio-0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: papilio\nVersion: 0\n")
    # In the order of setuptools, by name.
    sections = [
        "\n".join([f"[{group}]", *sorted(entries.split("\n")[1:])])
        for group, entries in setup["options.entry_points"].items()
    ]
    (information / "entry_points.txt").write_text("\n".join(sections))
