"""Where the `papilio` command and `torchx` come in: what Python imports first is arranged before anything else."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from papilio.trainer.elastic import bootstrap


def main() -> int:
    """Put our home before all else on sys.path but the standard library, then run the command line."""
    try:
        bootstrap.prefer_installed()
        from papilio.launch.cli import main as run

        return run()
    except KeyboardInterrupt:  # while modules are being imported
        print("papilio: interrupted", file=sys.stderr)
        return 130


def components() -> ModuleType:
    """Return our TorchX components, for the entry point `papilio`."""
    bootstrap.order_path()
    from papilio.launch import components as found

    return found


def create_slurm_scheduler(session_name: str, **settings: Any) -> Any:
    """Make our scheduler `slurm` for TorchX."""
    bootstrap.order_path()
    from papilio.launch.schedulers.slurm.torchx_slurm import create_scheduler

    return create_scheduler(session_name, **settings)
