"""Where bytes live: one iopath PathManager, so that any registered scheme works wherever a path is asked for."""

from __future__ import annotations

import posixpath

from iopath.common.file_io import PathManager

# Schemes of other storages are registered here by the application; a plain path is a local file.
path_manager = PathManager()


def join(folder: str, *parts: str) -> str:
    """Join path parts with "/" (works for URIs as for local paths)."""
    return posixpath.join(str(folder), *parts)
