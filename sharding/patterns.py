"""Names of tables by pattern, as a shell's: `*` any characters, `?` one, `[ab]` one of a set, `[!ab]` one of none."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern fits a whole name; a name fits itself, whatever brackets or stars it holds."""
    return name == pattern or fnmatchcase(name, pattern)


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Return the names that any of the patterns fits, in their order."""
    patterns = list(patterns)
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]
