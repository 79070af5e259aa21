"""Bytes of a run folder: the only module of the trainer that knows where paths lead."""

from __future__ import annotations

import json
from typing import Any

from data_pipeline.paths import path_manager, replace


def make_folder(path: str) -> None:
    """Create a folder and its parents, if need be."""
    path_manager.mkdirs(path)


def write_text(path: str, text: str) -> None:
    """Write a file through a temporary name, so that it is never half there."""
    with path_manager.open(path + ".tmp", "w") as file:
        file.write(text)
    replace(path + ".tmp", path)


def write_json(path: str, value: Any) -> None:
    """Write a value as indented JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: str) -> Any:
    """Read a JSON file."""
    with path_manager.open(path, "r") as file:
        return json.load(file)
