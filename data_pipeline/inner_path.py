"""Names of files that a manifest lists: they stay inside the folder of the manifest, whoever wrote it."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator


def inner_path_problem(name: object) -> str | None:
    """Say why a listed name could lead out of its folder, None if it cannot."""
    if not isinstance(name, str) or not name:
        return f"{str(name)[:80]!r} is no file name"
    if any(part in {"", ".", ".."} for part in name.split("/")) or "\0" in name:
        return f"file name {name[:80]!r} leads out of its folder; names are relative to it, without . and .."
    return None


def link_problem(folder: str, name: str) -> str | None:
    """Say which symbolic link leads out of a local folder on the way to a file in it, None if none does."""
    if "://" in folder:
        return None
    path, base = os.path.realpath(os.path.join(folder, name)), os.path.realpath(folder)
    if os.path.commonpath([path, base]) == base:
        return None
    return f"{os.path.join(folder, name)} is a link to {path}, outside of its folder; copy the file to its place"


def _require_inner(name: str) -> str:
    problem = inner_path_problem(name)
    if problem is not None:
        raise ValueError(problem)
    return name


InnerPath = Annotated[str, AfterValidator(_require_inner)]
