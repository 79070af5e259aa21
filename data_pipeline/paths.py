"""Where bytes live: one iopath PathManager, so that any registered scheme works wherever a path is asked for."""

from __future__ import annotations

import os
import posixpath

from iopath.common.file_io import PathManager

# Schemes of other storages are registered here by the application; a plain path is a local file.
path_manager = PathManager()


def join(folder: str, *parts: str) -> str:
    """Join path parts with "/" (works for URIs as for local paths)."""
    return posixpath.join(str(folder), *parts)


def replace(source: str, target: str) -> None:
    """Move a finished file to its name, over an older one. (iopath's own mv keeps the older one and only logs it.)

    Raises:
        OSError: the storage did not move it.
    """
    if "://" not in target:
        os.replace(source, target)
        return
    if path_manager.exists(target):
        path_manager.rm(target)
    if not path_manager.mv(source, target):
        raise OSError(f"could not move {source} to {target}")
