"""Which paths must lie on a disk: everything but checkpoints. A URI given for one of them would be a folder `s3:`."""

from __future__ import annotations

import re

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


class PathError(ValueError):
    """A path of a kind that does not work where it was given; the message names the argument or key, and the fix."""


def check_local_path(path: str, name: str) -> None:
    """Check that a path is one of this host's files and no URI.

    Args:
        path: as it was given.
        name: the argument or key it was given for.

    Raises:
        PathError: it has a scheme, as `s3://bucket/folder`.
    """
    if _SCHEME.match(path):
        raise PathError(
            f"{name} = {path}: object storage is not supported here; give a path on a local or shared disk (s3:// is "
            "for checkpoints only: checkpoint.folder, `papilio checkpoint`, export --run)"
        )
