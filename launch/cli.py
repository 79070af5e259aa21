"""The `papilio` command: finds the verb, parses its arguments, imports its job and runs it.

Exit status: 0 done, 1 the job failed, 2 the command line is wrong, 75 told to end and saved, to be resumed,
78 a mistake that no retry fixes, 130 and 143 interrupted and terminated.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from importlib import metadata

from papilio.data_pipeline.crash import describe_unforeseen
from papilio.data_pipeline.local_path import PathError, check_local_path
from papilio.data_pipeline.terminal import ends_quietly, fold, make_streams_safe
from papilio.launch.compat.argparse_internals import actions_of, subparser
from papilio.launch.usage import RefusedError, UsageError, is_ours
from papilio.launch.verbs import VERBS, Verb
from papilio.trainer.elastic.bootstrap import name_user, prefer_installed
from papilio.trainer.elastic.exit_codes import NO_RESTART_EXIT_CODE

# How help calls an argument that is a path; and those of them that may also be a URI: folders of checkpoints.
PATH_METAVARS = ("DIR", "FILE", "RUN", "RUN_DIR", "NAME|FILE", "diff OLD NEW")
URI_ARGUMENTS = {
    *((f"checkpoint {action}", "run") for action in ("list", "show", "verify", "prune", "export-dense")),
    ("checkpoint export-dense", "output"),
    ("export", "run"),
}
OVERRIDE = re.compile(r"--[A-Za-z]\w*(\.\w+)*=.*", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `papilio` with these arguments (default: the process's) and return the exit status."""
    if argv is not None:
        return _main(list(argv))
    prefer_installed()
    name_user()
    make_streams_safe()
    with ends_quietly():
        return _main(sys.argv[1:])


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"papilio {_version()}")
        return 0
    verb = next((verb for verb in VERBS if verb.name == arguments[0]), None)
    if verb is None:
        return _fail("papilio", f"{_unknown_verb(arguments[0])}; `papilio --help` lists them", 2)
    return _run(verb, parse_arguments(verb, arguments[1:]))


def parse_arguments(verb: Verb, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse what follows the verb; wrong arguments end the process with status 2 and one line on stderr."""
    parser = parser_of(verb)
    # argparse would take a setting with a space in it for a positional argument.
    settings = [word for word in arguments if verb.takes_overrides and _is_setting(word)]
    namespace, rest = parser.parse_known_args([word for word in arguments if word not in settings])
    known = {*settings, *(word for word in rest if verb.takes_overrides and _is_override(word, parser))}
    overrides = [word for word in arguments if word in known]
    unknown = [word for word in rest if word not in known]
    if unknown:
        nearest = _nearest_option(unknown[0], parser)
        hint = "settings of the recipe are written --section.key=value" if verb.takes_overrides else ""
        hint = f"did you mean {nearest}?" if nearest else hint
        parser.error(f"unknown argument {unknown[0]}" + (f"; {hint}" if hint else ""))
    namespace.overrides = overrides
    try:
        _check_paths(parser, namespace, verb.name)
    except PathError as error:
        parser.error(str(error))
    return namespace


def parser_of(verb: Verb) -> argparse.ArgumentParser:
    """Return the parser of what follows a verb."""
    parser = _Parser(
        prog=f"papilio {verb.name}",
        description=f"{verb.summary[0].upper()}{verb.summary[1:]}.",
        epilog=_epilog(verb),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.add_arguments(parser)
    return parser


def _check_paths(parser: argparse.ArgumentParser, namespace: argparse.Namespace, words: str) -> None:
    """Check the arguments that are paths, of a verb or of the action below it.

    Raises:
        PathError: one is a URI where only a disk will do.
    """
    for action in actions_of(parser):
        value = getattr(namespace, action.dest, None)
        below = subparser(action, str(value))
        if below is not None:
            _check_paths(below, namespace, f"{words} {value}")
        elif action.metavar in PATH_METAVARS and (words, action.dest) not in URI_ARGUMENTS:
            name = action.option_strings[-1] if action.option_strings else action.metavar
            for path in value if isinstance(value, list) else [value]:
                if path is not None:
                    check_local_path(path, name)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"{self.prog}: error: {message} (`{self.prog} --help` explains)\n")


def _run(verb: Verb, namespace: argparse.Namespace) -> int:
    module_name, _, function_name = verb.job.partition(":")
    try:
        return int(getattr(importlib.import_module(module_name), function_name)(namespace))
    except Exception as error:
        if not is_ours(error):
            if isinstance(error, OSError) and error.filename is None:
                raise  # of what is printed, perhaps: the caller knows, as under `| head`
            return _fail(f"papilio {verb.name}", describe_unforeseen(error), 1)
        status = 2 if isinstance(error, UsageError) else NO_RESTART_EXIT_CODE if isinstance(error, RefusedError) else 1
        return _fail(f"papilio {verb.name}", str(error), status)
    except KeyboardInterrupt:
        return _fail(f"papilio {verb.name}", "interrupted", 130)


def _fail(prefix: str, message: str, status: int) -> int:
    print(f"{prefix}: error: {message}", file=sys.stderr)
    return status


def _overview() -> str:
    width = max(len(verb.name) for verb in VERBS)
    return "\n".join(
        [
            "usage: papilio VERB [arguments]",
            "",
            "Trains deep learning recommendation models with sharded embedding tables.",
            "",
            *(fold(f"  {verb.name:{width}}  {verb.summary}", width + 4) for verb in VERBS),
            "",
            "`papilio VERB --help` explains a verb; `papilio --version` prints the version.",
        ]
    )


def _epilog(verb: Verb) -> str:
    lines = [f"example:\n  {verb.example}"]
    if verb.takes_overrides:
        lines.insert(0, "Any setting of the recipe can be replaced: --section.key=value, as often as needed.\n")
    return "\n".join(lines)


def _unknown_verb(word: str) -> str:
    nearest = difflib.get_close_matches(word, [verb.name for verb in VERBS], 1)
    return f"there is no verb {word}" + (f"; did you mean {nearest[0]}?" if nearest else "")


def _is_setting(word: str) -> bool:
    return OVERRIDE.fullmatch(word) is not None and "." in word.partition("=")[0]


def _is_override(word: str, parser: argparse.ArgumentParser) -> bool:
    return OVERRIDE.fullmatch(word) is not None and _nearest_option(word, parser) is None


def _nearest_option(word: str, parser: argparse.ArgumentParser) -> str | None:
    options = [option for action in actions_of(parser) for option in action.option_strings]
    return next(iter(difflib.get_close_matches(word.partition("=")[0], options, 1, cutoff=0.7)), None)


def _version() -> str:
    try:
        return metadata.version("papilio")
    except metadata.PackageNotFoundError:
        return "from a checkout that is not installed"


if __name__ == "__main__":
    sys.exit(main())
