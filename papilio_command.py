"""The `papilio` command, under a name that no other project's module has.

Were it one of our packages' generic names, a `launch` on PYTHONPATH would be imported and run in place of ours.
"""

from __future__ import annotations

import importlib.util
import os
import sys


def main() -> int:
    """Put our packages before all others of their names, then run the command line."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "trainer", "bootstrap.py")
    try:
        spec = importlib.util.spec_from_file_location("papilio_bootstrap", path)
        assert spec is not None and spec.loader is not None
        bootstrap = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(bootstrap)
        bootstrap.prefer_installed()
        from launch.cli import main as run

        return run()
    except KeyboardInterrupt:  # while modules are being imported
        print("papilio: interrupted", file=sys.stderr)
        return 130
