"""From TOML text to a model, and from what is wrong with either to one line that names the key and the fix."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

_MAX_PROBLEMS = 5
_MAX_VALUE_CHARACTERS = 80


class TomlError(ValueError):
    """Text that is not TOML, or a file that cannot be read; the message says why."""


def parse_toml(data: bytes) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        TomlError: it is none; one line.
    """
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise TomlError("is not TOML: values nested far too deep") from None
    except UnicodeDecodeError as error:
        raise TomlError(f"is not UTF-8 text ({error.reason} at byte {error.start:,}); save it as UTF-8") from None
    except ValueError as error:  # not TOML, or a number of thousands of digits
        raise TomlError(f"is not TOML: {error}") from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        TomlError: it is missing, a folder, not readable, or not TOML.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise TomlError("does not exist") from None
    except IsADirectoryError:
        raise TomlError("is a folder, not a file") from None
    except OSError as error:
        raise TomlError(f"cannot be read ({error.strerror or error})") from None
    return parse_toml(data)


def explain(error: ValidationError, model: type[BaseModel], tree: Any, where_to_set: str = "add it") -> str:
    """Say in one line what is wrong with `tree`, key by key.

    Args:
        error: what `model.model_validate(tree)` raised.
        model: whose keys are allowed.
        tree: plain values; items of a list are named by their `name`.
        where_to_set: what to do about a missing key; "{key}" in it is replaced by the key.
    """
    # A list one of whose items is wrong is wrong, too, to pydantic: only the item is worth a line.
    found = error.errors()
    places = [problem["loc"] for problem in found]
    problems = [problem for problem in found if not any(_is_within(place, problem["loc"]) for place in places)]
    lines = [_explain(dict(problem), model, tree, where_to_set) for problem in problems[:_MAX_PROBLEMS]]
    if len(problems) > _MAX_PROBLEMS:
        lines.append(f"and {len(problems) - _MAX_PROBLEMS} more")
    return "; ".join(lines)


def _is_within(place: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return 0 < len(outer) < len(place) and place[: len(outer)] == outer


def _explain(problem: dict[str, Any], model: type[BaseModel], tree: Any, where_to_set: str) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    of = _name_of_item(problem["loc"], tree)
    if problem["type"] == "extra_forbidden":
        known = known_keys(model, path[:-1])
        nearest = difflib.get_close_matches(path[-1], known, n=1)
        fix = f"did you mean {'.'.join([*path[:-1], nearest[0]])}?" if nearest else f"known: {', '.join(known)}"
        return f"there is no key {key[:200]}{of}; {fix}"
    if problem["type"] == "missing":
        return f"{key}{of} is missing; {where_to_set.replace('{key}', key)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        return f"{key}{of}: {message}" if key else message  # of a whole section, which the message names
    return f"{key}{of} = {shown_value(problem['input'])}: {message}"


def _name_of_item(loc: Sequence[int | str], tree: Any) -> str:
    name = None
    for part in loc:
        try:
            tree = tree[part]
        except (LookupError, TypeError):
            break
        if isinstance(part, int) and isinstance(tree, dict) and isinstance(tree.get("name"), str):
            name = tree["name"]
    return "" if name is None else f" (of {name[:_MAX_VALUE_CHARACTERS]})"


def shown_value(value: Any) -> str:
    """A value as messages show it, cut."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (RecursionError, ValueError):
        text = f"(a {type(value).__name__} that cannot be shown)"
    return text if len(text) <= _MAX_VALUE_CHARACTERS else text[: _MAX_VALUE_CHARACTERS - 1] + "…"


def known_keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Keys that may stand in the section at `path`; none where anything may."""
    section: Any = model
    for part in path:
        if part.isdigit():
            continue  # an item of a list: the list's annotation led to the item's model
        field = section.model_fields.get(part)
        section = None if field is None else _model_in(field.annotation)
        if section is None:
            return []
    return list(section.model_fields)


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((a for a in get_args(annotation) if isinstance(a, type) and issubclass(a, BaseModel)), None)
