"""From a recipe file and command-line overrides to a `Config`; every mistake is named with its mend."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from data_pipeline.local_path import PathError, check_local_path
from trainer.config import Config

RECIPE_SUFFIX = ".toml"
_MAX_SHOWN = 100  # characters of a wrong value in a message


class ConfigError(ValueError):
    """A recipe or an override that cannot be used; the message names the key, the value and the mend."""


def load_config(recipe: str, overrides: Sequence[str] = (), hardware: str | None = None) -> Config:
    """Read a recipe and apply overrides of the form `--section.key=value`, the last one winning.

    Args:
        recipe: path of a TOML file, or the bare name of one that Papilio ships (for example "quickstart").
        overrides: command-line words; values are TOML literals, or else plain text.
        hardware: of the hosts that the job asked for: `sharding.hardware` where nothing else is said.

    Raises:
        ConfigError: the recipe is missing or is not TOML, or a key or a value is wrong.
    """
    tree = _read_toml(recipe)
    for word in overrides:
        _apply_override(tree, word)
    if hardware is not None and isinstance(sharding := tree.setdefault("sharding", {}), dict):
        sharding.setdefault("hardware", hardware)
    return build_config(tree, source=recipe)


def build_config(tree: dict[str, Any], source: str) -> Config:
    """Validate a tree of plain values.

    Raises:
        ConfigError: all that is wrong with it, a line each.
    """
    try:
        return Config.model_validate(tree)
    except RecursionError:
        raise ConfigError(f"{source}: a value is nested too deep") from None
    except ValidationError as error:
        lines = [_explain(dict(problem)) for problem in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with Papilio."""
    folder = resources.files("launch") / "recipes"
    return sorted(f.name.removesuffix(RECIPE_SUFFIX) for f in folder.iterdir() if f.name.endswith(RECIPE_SUFFIX))


def _read_toml(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    try:
        check_local_path(recipe, "recipe")
        if os.path.isfile(recipe):  # unlike Path's, it takes a name with a NUL for none
            return tomllib.loads(path.read_text("utf-8"))
        if recipe in shipped_recipes():
            return tomllib.loads((resources.files("launch") / "recipes" / (recipe + RECIPE_SUFFIX)).read_text("utf-8"))
    except PathError as error:
        raise ConfigError(str(error)) from None
    except RecursionError:
        raise ConfigError(f"recipe {recipe} is not TOML: nested too deep") from None
    except ValueError as error:  # not TOML, not UTF-8, an integer of 5,000 digits
        raise ConfigError(f"recipe {recipe} is not TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"recipe {recipe} cannot be read: {error.strerror}") from None
    what = "is a folder" if os.path.isdir(recipe) else "does not exist"
    raise ConfigError(f"recipe {recipe} {what}; give a file's path or one of: {', '.join(shipped_recipes())}")


def _apply_override(tree: dict[str, Any], word: str) -> None:
    key, equals, text = word.removeprefix("--").partition("=")
    if not word.startswith("--") or not equals or not key:
        raise ConfigError(f"override {word!r} is not of the form --section.key=value")
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {word!r}: {section} is a value, not a section")
    node[last] = _parse_value(text)


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # no TOML: plain text
        return None if text in {"none", "None", "null"} else text


def _explain(problem: dict[str, Any]) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path) or "recipe"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        nearest = difflib.get_close_matches(path[-1], known, n=1)
        mend = f"did you mean {'.'.join([*path[:-1], nearest[0]])}?" if nearest else f"known: {', '.join(known)}"
        return f"there is no key {key}; {mend}"
    if problem["type"] == "missing":
        return f"{key} is missing; set it in the recipe or with --{key}=..."
    if problem["type"] == "value_error":  # of our own checks, which name the key themselves
        return str(problem["ctx"]["error"])
    value = json.dumps(problem["input"], default=str)
    shown = value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}..."
    return f"{key} = {shown}: {problem['msg']}"


def _known_keys(path: Sequence[str]) -> list[str]:
    section: Any = Config
    for part in path:
        field = section.model_fields.get(part)
        if field is None:
            return []
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            section = next((a for a in get_args(section) if isinstance(a, type) and issubclass(a, BaseModel)), None)
        if section is None:
            return []
    return list(section.model_fields)
