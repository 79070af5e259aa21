"""From a recipe file and command-line overrides to a `Config`; every mistake is named with its fix."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from papilio.data_pipeline.local_path import PathError, check_local_path
from papilio.data_pipeline.toml_model import TomlError, explain, parse_toml, read_toml
from papilio.trainer.config import Config

RECIPE_SUFFIX = ".toml"


class ConfigError(ValueError):
    """A recipe or an override that cannot be used; the message names the key, the value and the fix."""


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
        how = "set it in the recipe or with --{key}=..."
        raise ConfigError(f"{source}: {explain(error, Config, tree, how)}") from None


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with Papilio."""
    folder = resources.files("papilio.launch") / "recipes"
    return sorted(f.name.removesuffix(RECIPE_SUFFIX) for f in folder.iterdir() if f.name.endswith(RECIPE_SUFFIX))


def _read_toml(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    try:
        check_local_path(recipe, "recipe")
        if os.path.isfile(recipe):  # unlike Path's, it takes a name with a NUL for none
            return read_toml(path)
        if recipe in shipped_recipes():
            return parse_toml((resources.files("papilio.launch") / "recipes" / (recipe + RECIPE_SUFFIX)).read_bytes())
    except PathError as error:
        raise ConfigError(str(error)) from None
    except TomlError as error:
        raise ConfigError(f"recipe {recipe} {error}") from None
    what = "is a folder" if os.path.isdir(recipe) else "does not exist"
    raise ConfigError(f"recipe {recipe} {what}; give a file's path or one of: {', '.join(shipped_recipes())}")


def _apply_override(tree: dict[str, Any], word: str) -> None:
    key, equals, text = word.removeprefix("--").partition("=")
    if not word.startswith("--") or not equals or not key:
        raise ConfigError(f"override {word!r} is not of the form --section.key=value")
    *sections, last = _parts_of(key)
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {word!r}: {section} is a value, not a section")
    node[last] = _parse_value(text)


def _parts_of(key: str) -> list[str]:
    """Split a key at its dots; a part with dots in it stands in double quotes, as in TOML."""
    if '"' not in key:
        return key.split(".")
    return [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|([^."]+)', key)]


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # no TOML: plain text
        return None if text in {"none", "None", "null"} else text
