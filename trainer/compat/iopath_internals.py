"""Private names of iopath: what a PathManager knows, and the hooks of a handler.

A PathManager takes a scheme that it does not know for a local folder, and has no public way to be asked which it
knows. A `PathHandler` is documented as a class to extend, by hooks that are underscored.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from papilio.sharding.compat.private_name import PrivateName

_OF_PATH = ("self", "path")
_HOOKS = {
    "_check_kwargs": ("self", "kwargs"),
    "_get_supported_prefixes": ("self",),
    "_open": ("self", "path", "mode"),
    **dict.fromkeys(("_exists", "_isdir", "_isfile", "_ls", "_mkdirs", "_rm"), _OF_PATH),
}
NEEDED = (
    PrivateName(
        "iopath.common.file_io.PathManager", "_path_handlers", "to refuse a scheme that is unknown", is_assigned=True
    ),
    # Overridden by S3Handler (trainer/storage/s3_paths.py).
    *(
        PrivateName("iopath.common.file_io.PathHandler", name, "to read and write s3:// paths", parameters)
        for name, parameters in _HOOKS.items()
    ),
)


def known_prefixes(path_manager: Any) -> Collection[str]:
    """Return the prefixes ("s3://") for which a PathManager has a handler."""
    prefixes: Collection[str] = path_manager._path_handlers.keys()
    return prefixes
