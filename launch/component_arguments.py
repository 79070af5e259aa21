"""The arguments of a component as `papilio launch COMPONENT` takes them: typed, checked, and explained.

`torchx run` parses them as well, but leaves as text what may be None, takes the beginning of a name for the name, and
finds a stray word only when the job runs. Names and help come from the component's signature and docstring alone.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import time
import types
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from torchx import specs
from torchx.specs import finder
from torchx.specs.file_linter import get_fn_docstring
from torchx.util.types import to_dict

from papilio.launch import components
from papilio.launch.cli import parse_arguments
from papilio.launch.usage import UsageError, refusing
from papilio.launch.verbs import Verb
from papilio.trainer.config_file import load_config

EXAMPLES = {
    "train": "--recipe quickstart --nnodes 4 --nproc 8 --train.epochs=2",
    "evaluate": "--run runs/quickstart --split test",
    "preprocess": "--source criteo --input day_0.gz,day_1.gz --output datasets/terabyte",
}
# Their jobs have flags of their own, which stand behind `--` with the settings.
WITH_FLAGS = {"preflight"}
PORT = "rdzv_port"
# Two jobs may share a host, and each needs a port of its own to meet at; below those that the kernel gives away.
FIRST_PORT, NUM_PORTS = 29_500, 3_000


def build_app(name: str, words: Sequence[str]) -> specs.AppDef:
    """Return the job of a component, ours or TorchX's, with these arguments; `--help` among them is followed.

    Raises:
        UsageError: there is no such component.
        RefusedError: the recipe or a setting of it is wrong; found here, not after the job has waited in a queue.
    """
    bare = name.removeprefix("papilio.")
    component = our_components().get(bare)
    if component is None:
        return _build_other(name, words)
    known, rest = _split(words, takes_settings=_takes_settings(component) and bare not in WITH_FLAGS)
    namespace = vars(parse_arguments(_as_verb(bare, component), known))
    overrides = namespace.pop("overrides")
    if bare == "train":
        with refusing():
            load_config(namespace["recipe"], overrides)
    if PORT in namespace and namespace[PORT] is None:
        namespace[PORT] = _free_looking_port()
    app: specs.AppDef = component(*overrides, *rest, **namespace)
    return app


def our_components() -> dict[str, Callable[..., specs.AppDef]]:
    """Return Papilio's components by their names without `papilio.`."""
    found = {name: value for name, value in vars(components).items() if inspect.isfunction(value)}
    return {name: value for name, value in found.items() if value.__module__ == components.__name__}


def _build_other(name: str, words: Sequence[str]) -> specs.AppDef:
    if "." not in name and ":" not in name:
        ours = ", ".join(our_components())
        raise UsageError(f"there is no component {name}; there are {ours}, and TorchX's own, as dist.torchrun")
    try:
        component = finder.get_component(name).fn
    except (finder.ComponentNotFoundException, finder.ComponentValidationException) as error:
        raise UsageError(str(error)) from None
    return specs.materialize_appdef(component, list(words))


def _split(words: Sequence[str], takes_settings: bool) -> tuple[list[str], list[str]]:
    """Part the words at `--`: what follows is passed on as it is, unless these are settings, which go anywhere."""
    if "--" not in words:
        return list(words), []
    place = list(words).index("--")
    before, after = list(words[:place]), list(words[place + 1 :])
    return ([*before, *after], []) if takes_settings else (before, after)


def _as_verb(name: str, component: Callable[..., specs.AppDef]) -> Verb:
    summary, helps = get_fn_docstring(component)
    return Verb(
        f"launch {name}",
        summary.strip().rstrip("."),
        f"papilio launch -s slurm {name} {EXAMPLES[name]}" if name in EXAMPLES else f"papilio launch {name} ...",
        functools.partial(_add_arguments, component=component, helps=helps),
        job="",
        takes_overrides=_takes_settings(component),
    )


def _takes_settings(component: Callable[..., specs.AppDef]) -> bool:
    return "overrides" in inspect.signature(component).parameters


def _add_arguments(
    parser: argparse.ArgumentParser, component: Callable[..., specs.AppDef], helps: Mapping[str, str]
) -> None:
    for name, parameter in inspect.signature(component).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            continue
        kind = _kind(parameter.annotation)
        is_required = parameter.default is inspect.Parameter.empty
        text = helps.get(name, "").replace("%", "%%")
        if name == PORT:
            text, default = f"{text} (default: another one for each job)", None
        else:
            default = None if is_required else parameter.default
            text += f" (default: {default})" if default not in (None, "") and "default:" not in text else ""
        parse, metavar = _READERS[kind]
        parser.add_argument(
            f"--{name}", type=parse, required=is_required, default=default, help=text, metavar=metavar, dest=name
        )


def _kind(annotation: Any) -> type:
    """Return the type itself of `int | None`, `list[str]` and the like."""
    if isinstance(annotation, types.UnionType):
        annotation = next(choice for choice in get_args(annotation) if choice is not types.NoneType)
    found: type = getattr(annotation, "__origin__", annotation)
    return found


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _variables(text: str) -> dict[str, str]:
    try:
        return dict(to_dict(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, or several with commas between them") from None


_READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    str: (str, "TEXT"),
    int: (_whole_number, "N"),
    float: (_number, "X"),
    bool: (_truth, "true|false"),
    list: (lambda text: text.split(","), "A,B"),
    dict: (_variables, "NAME=VALUE"),
}


def _free_looking_port() -> int:
    seed = f"{os.getpid()} {time.time_ns()}".encode()
    return FIRST_PORT + zlib.crc32(seed) % NUM_PORTS
