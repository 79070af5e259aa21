"""Private names of argparse, which has no public way to list the arguments of a parser. Loads nothing else."""

from __future__ import annotations

import argparse

from papilio.sharding.compat.private_name import PrivateName

NEEDED = (
    PrivateName("argparse.ArgumentParser", "_actions", "to see which arguments are paths", is_assigned=True),
    PrivateName("argparse", "_SubParsersAction", "to see the arguments of an action below a verb"),
)


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return all arguments of a parser, --help among them."""
    return list(parser._actions)


def subparser(action: argparse.Action, name: str) -> argparse.ArgumentParser | None:
    """Return the parser of the action below a verb that was chosen by `name`; None if `action` is no such choice."""
    if isinstance(action, argparse._SubParsersAction):
        found: argparse.ArgumentParser = action.choices[name]
        return found
    return None
