"""From the command line's arguments to a job's options, and from what is wrong with these back to the arguments."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from papilio.launch.usage import UsageError

Options = TypeVar("Options", bound=BaseModel)


def given_options(namespace: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were given, by field."""
    return {name: value for name, value in vars(namespace).items() if name != "overrides"}


def build_options(options_type: type[Options], given: Mapping[str, Any], flags: Mapping[str, str]) -> Options:
    """Validate options; `flags` names the fields whose flag is not the field's own name.

    Raises:
        UsageError: a value is not allowed; names its flag.
    """
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
