"""The version of Papilio that writes a data set, a run or a checkpoint."""

from __future__ import annotations

from importlib import metadata


def papilio_version() -> str:
    """Return the installed version."""
    try:
        return metadata.version("papilio")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"
