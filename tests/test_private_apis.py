"""The fence around private names: those that `compat` modules declare are there, and no other module touches any."""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from types import ModuleType

import pytest

from papilio.sharding.compat.private_name import PrivateName
from tests.test_architecture import MODULES, PACKAGES

# Whose private names are fenced. Those of the rest of the standard library (os._exit) are documented.
FENCED = {"argparse", "fbgemm_gpu", "iopath", "torch", "torchrec", "torchx", "uvicorn"}
COMPAT = sorted(name for name in MODULES if ".compat." in name)
OUTSIDE = sorted(name for name in MODULES if name.partition(".")[0] in PACKAGES and ".compat." not in name)
# Python's own and torch's bookkeeping in every class.
OF_EVERY_CLASS = {"_abc_impl", "_backward_cls"}


def version_of(library: str) -> str:
    """The release of an installed library."""
    if library == "argparse":
        return sys.version.split()[0]
    for distribution in (library.replace("_", "-"), "fbgemm-gpu-cpu"):
        try:
            return metadata.version(distribution).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    raise AssertionError(f"{library} is not installed")


def resolve(path: str) -> object:
    """The module or class with this name; raises AttributeError or ModuleNotFoundError where there is none."""
    module_name, rest = path, []
    while True:
        try:
            found: object = importlib.import_module(module_name)
            break
        except ModuleNotFoundError:
            module_name, _, last = module_name.rpartition(".")
            rest.insert(0, last)
            if not module_name:
                raise
    for name in rest:
        found = getattr(found, name)
    return found


def assigned_names(owner: type) -> set[str]:
    """The names that methods of a class, or of those it inherits from, assign to an instance, or that it declares."""
    names: set[str] = set()
    for cls in owner.__mro__:
        if cls.__module__ != "builtins":
            names |= set(vars(cls)) | set(getattr(cls, "__annotations__", {}))
            try:
                names |= set(re.findall(r"\bself\.(\w+)", inspect.getsource(cls)))
            except (OSError, TypeError):
                continue  # written in C
    return names


def problem_of(need: PrivateName) -> str | None:
    """What is wrong with a declared name in the library that is installed; None if it is there as declared."""
    try:
        owner = resolve(need.owner)
    except (AttributeError, ModuleNotFoundError):
        return f"has no longer {need.owner}"
    if need.is_assigned:
        assert isinstance(owner, type)
        return None if need.name in assigned_names(owner) else f"has no longer {need.owner}.{need.name}"
    if not hasattr(owner, need.name):
        return f"has no longer {need.owner}.{need.name}"
    if not need.parameters:
        return None
    found = tuple(inspect.signature(getattr(owner, need.name)).parameters)
    if found[: len(need.parameters)] != need.parameters:
        return f"has {need.owner}.{need.name}({', '.join(found)}), expected ({', '.join(need.parameters)}, ...)"
    return None


def is_of_later_release(need: PrivateName) -> bool:
    """Whether the installed library is older than the name."""
    numbers = [
        tuple(map(int, version.split(".")[:2])) for version in (version_of(need.depends_on), need.since or "0.0")
    ]
    return numbers[0] < numbers[1]


def message_of(need: PrivateName, problem: str, module: str) -> str:
    """What a failing contract test says."""
    path = module.removeprefix("papilio.").replace(".", "/")
    return f"{need.depends_on} {version_of(need.depends_on)} {problem}; {path}.py needs it {need.purpose}"


def declared() -> Iterator[tuple[str, PrivateName]]:
    """All declarations, each with the module in which it stands."""
    for name in COMPAT:
        for need in getattr(importlib.import_module(f"papilio.{name}"), "NEEDED", ()):
            yield name, need


@pytest.mark.parametrize(("module", "need"), declared(), ids=lambda value: getattr(value, "name", value))
def test_the_installed_versions_have_what_is_declared(module: str, need: PrivateName) -> None:
    if is_of_later_release(need):
        pytest.skip(f"{need.depends_on} has it since {need.since}")
    problem = problem_of(need)
    assert problem is None, message_of(need, problem, module)


@pytest.mark.parametrize(
    ("need", "message"),
    [
        (
            PrivateName("torch.autograd", "_gone", "to test this"),
            r"torch \d[\d.]+ has no longer torch.autograd._gone; sharding/compat/x.py needs it to test this",
        ),
        (PrivateName("torch._gone.deeper", "_name", "to test this"), "has no longer torch._gone.deeper; "),
        (
            PrivateName("argparse.ArgumentParser", "_gone", "to test this", is_assigned=True),
            r"argparse \d[\d.]+ has no longer argparse.ArgumentParser._gone; ",
        ),
        (
            PrivateName("argparse.ArgumentParser", "parse_args", "to test this", ("self", "words")),
            r"has argparse.ArgumentParser.parse_args\(self, args, namespace\), expected \(self, words, ...\); ",
        ),
    ],
)
def test_a_name_that_is_gone_or_changed_is_told(need: PrivateName, message: str) -> None:
    problem = problem_of(need)
    assert problem is not None
    assert re.search(message, message_of(need, problem, "sharding.compat.x"))


def test_the_kernel_of_rowwise_adagrad_takes_what_it_is_given() -> None:
    import fbgemm_gpu  # noqa: F401  # registers torch.ops.fbgemm

    from papilio.sharding.compat import fbgemm_internals

    found = fbgemm_internals.rowwise_adagrad_arguments()
    if "learning_rate_tensor" not in found:
        pytest.skip(f"fbgemm {version_of('fbgemm_gpu')} takes a number, and is left as it is")
    expected = fbgemm_internals.ROWWISE_ADAGRAD_ARGUMENTS
    assert found[: len(expected)] == expected, "sharding/runtime/rowwise_adagrad.py passes them in this order"


def test_a_kernel_has_what_the_fixes_read() -> None:
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        EmbeddingLocation,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    from papilio.sharding.compat.fbgemm_internals import tbe_lacks

    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(4, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD
    )
    assert tbe_lacks(tbe) == (), f"fbgemm {version_of('fbgemm_gpu')} lacks it; sharding/runtime needs it"
    assert "D_offsets" in tbe_lacks(torch.nn.Identity())


def own_names(tree: ast.AST) -> set[str]:
    """Names that a module gives by itself: to functions, classes, variables and attributes."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore, or with two and is no protocol of Python."""
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def foreign_private_names(tree: ast.AST) -> Iterator[str]:
    """Private names of fenced libraries that a module touches, those it inherits from them apart."""
    own = own_names(tree)
    stdlib = sys.stdlib_module_names - FENCED
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            paths = []
        for path in paths:
            root, *rest = path.split(".")
            if root in FENCED:
                yield from filter(is_private, rest)
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            base = ast.unparse(node.value)
            if base not in {"self", "cls", "super()"} and base not in stdlib and node.attr not in own:
                yield node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "setattr", "hasattr", "delattr"}:
            name = node.args[1]
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and is_private(name.value):
                yield name.value


@pytest.mark.parametrize("module", OUTSIDE)
def test_no_other_module_touches_a_private_name(module: str) -> None:
    found = set(foreign_private_names(MODULES[module]))
    assert not found, f"{module} touches {sorted(found)}: put a typed function for it into a compat package"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch._inductor", ["_inductor"]),
        ("from torch.distributed._shard.api import x", ["_shard"]),
        ("from torchrec.distributed.types import _x", ["_x"]),
        ("def f(bags):\n    return bags._lookups", ["_lookups"]),
        ('found = getattr(bags, "_lookups", [])', ["_lookups"]),
        ("import os\nos._exit(1)", []),
        ("class A:\n    def _x(self): ...\ndef f(a: A):\n    return a._x()", []),
        ("from papilio.x import y\ny.__name__", []),
    ],
)
def test_the_search_finds_private_names(source: str, names: list[str]) -> None:
    assert list(foreign_private_names(ast.parse(source))) == names


def private_names_of(cls: type) -> set[str]:
    """Private names that a class defines, or reads and assigns on itself."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        source = ""
    return set(filter(is_private, {*vars(cls), *re.findall(r"\b(?:self|cls|super\(\))\.(\w+)", source)}))


def subclasses_of_fenced(module: ModuleType) -> Iterator[tuple[type, type]]:
    """Classes of a module, each with a class of a fenced library that it inherits from."""
    for cls in vars(module).values():
        if isinstance(cls, type) and cls.__module__ == module.__name__:
            for base in cls.__mro__:
                if base.__module__.partition(".")[0] in FENCED:
                    yield cls, base


def with_bases(tree: ast.AST) -> bool:
    """Whether a module has a class that inherits."""
    return any(isinstance(node, ast.ClassDef) and node.bases for node in ast.walk(tree))


@pytest.mark.parametrize("module", [name for name in OUTSIDE if with_bases(MODULES[name])])
def test_what_a_subclass_shares_with_its_base_is_declared(module: str) -> None:
    """Be it an override of a hook, or a name of ours that happens to be the library's, too."""
    allowed: dict[str, set[str]] = {}
    for _, need in declared():
        allowed.setdefault(need.owner, set()).add(need.name)
    for cls, base in subclasses_of_fenced(importlib.import_module(f"papilio.{module}")):
        shared = (private_names_of(cls) & private_names_of(base)) - OF_EVERY_CLASS
        declared_here = {
            name for one in cls.__mro__ for name in allowed.get(f"{one.__module__}.{one.__qualname__}", ())
        }
        assert shared <= declared_here, (
            f"{module}.{cls.__name__} shares {sorted(shared - declared_here)} with {base.__module__}.{base.__name__}: "
            "declare it in a compat module if that is meant, else rename it"
        )


def test_every_compat_module_declares_its_names() -> None:
    assert COMPAT, "there are compat packages"
    for name in COMPAT:
        if name != "sharding.compat.private_name":
            assert hasattr(importlib.import_module(f"papilio.{name}"), "NEEDED"), name
