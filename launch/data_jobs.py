"""The verbs that make data sets: from the command line's arguments to the options of data_pipeline."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from data_pipeline.generate import generate
from data_pipeline.generate_options import GenerateOptions
from data_pipeline.preprocess import preprocess
from data_pipeline.preprocess_options import PreprocessOptions
from launch.usage import UsageError, require_files

Options = TypeVar("Options", bound=BaseModel)


def run_preprocess(namespace: argparse.Namespace) -> int:
    """Preprocess raw files into a data set."""
    given = _given(namespace)
    require_files("--input", given["inputs"])
    if given["source"] == "table" and "schema_path" not in given:
        raise UsageError("--source table needs --schema FILE, which names the label, dense and categorical columns")
    require_files("--schema", [given["schema_path"]] if "schema_path" in given else [])
    preprocess(_build(PreprocessOptions, given, {"inputs": "--input", "schema_path": "--schema"}))
    return 0


def run_generate(namespace: argparse.Namespace) -> int:
    """Generate a data set."""
    generate(_build(GenerateOptions, _given(namespace), {"num_rows": "--rows"}))
    return 0


def _given(namespace: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(namespace).items() if name != "overrides"}


def _build(options_type: type[Options], given: Mapping[str, Any], flags: Mapping[str, str]) -> Options:
    """Validate options; `flags` names the fields whose flag is not the field's own name."""
    try:
        return options_type.model_validate(given)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            field = str(problem["loc"][0]) if problem["loc"] else ""
            flag = flags.get(field, "--" + field.replace("_", "-")) + " " if field else ""
            message = problem["msg"].removeprefix("Value error, ")
            problems.append(f"{flag}{problem['input']}: {message}" if field else message)
        raise UsageError("; ".join(problems)) from None
