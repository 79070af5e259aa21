"""Where the `papilio` command and `torchx` come in, under a name that no other project's module has.

Were it one of our packages' generic names, a `launch` on PYTHONPATH would be imported and run in place of ours.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType
from typing import Any


def main() -> int:
    """Put our packages before all others of their names, then run the command line."""
    try:
        _bootstrap().prefer_installed()
        from launch.cli import main as run

        return run()
    except KeyboardInterrupt:  # while modules are being imported
        print("papilio: interrupted", file=sys.stderr)
        return 130


def components() -> ModuleType:
    """Return our TorchX components, for the entry point `papilio`, from where Papilio is installed."""
    _bootstrap().order_path()
    from launch import components as found

    return found


def create_slurm_scheduler(session_name: str, **settings: Any) -> Any:
    """Make our scheduler `slurm` for TorchX, from where Papilio is installed."""
    _bootstrap().order_path()
    from launch.schedulers.torchx_slurm import create_scheduler

    return create_scheduler(session_name, **settings)


def _bootstrap() -> Any:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "trainer", "bootstrap.py")
    spec = importlib.util.spec_from_file_location("papilio_bootstrap", path)
    assert spec is not None and spec.loader is not None
    bootstrap = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    return bootstrap
