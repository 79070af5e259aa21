"""The recipes that come with Papilio, as files, from a checkout as from an installed wheel."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path

from launch.usage import UsageError


class RecipeError(UsageError):
    """A recipe that cannot be found; the message names those that can."""


def shipped_recipes() -> dict[str, Path]:
    """Recipes by their bare name, "quickstart" for `launch/recipes/quickstart.toml`."""
    folder = Path(str(resources.files("launch"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_recipe(recipe: str) -> str:
    """Turn the bare name of a shipped recipe into its path; anything that looks like a path comes back as it is.

    Raises:
        RecipeError: the path is not a file, or no shipped recipe has this name.
    """
    path = Path(recipe)
    if path.is_file() or "://" in recipe:
        return recipe
    shipped = shipped_recipes()
    if recipe in shipped:
        return str(shipped[recipe])
    known = ", ".join(shipped) or "none"
    if path.suffix or len(path.parts) > 1:
        raise RecipeError(f"recipe {recipe} does not exist; give the path of a .toml file or a shipped recipe: {known}")
    nearest = difflib.get_close_matches(recipe, shipped, 1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise RecipeError(f"no shipped recipe is named {recipe}; {hint}give the path of a .toml file or one of: {known}")
