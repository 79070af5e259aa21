"""Who may import whom (CONTRIBUTING.md), as a syntax tree can tell it; tests/launch/test_cli.py sees what is loaded."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("data_pipeline", "launch", "sharding", "trainer")
FILES = sorted(path for folder in (*PACKAGES, "benchmarks") for path in (REPOSITORY / folder).rglob("*.py"))
# What a package may import of the others; every package may import itself and the standard library.
OWN_IMPORTS = {
    "benchmarks": {"benchmarks", *PACKAGES},
    "data_pipeline": set(),
    "launch": {"data_pipeline", "sharding", "trainer"},
    "sharding": set(),
    "trainer": {"data_pipeline", "sharding"},
}
FOREIGN_IMPORTS = {
    "data_pipeline": {"torch", "torchrec", "numpy", "pyarrow", "iopath", "pydantic", "tqdm", "zstandard"},
    "launch": {"kubernetes", "pydantic", "torchx", "urllib3"},
    "sharding": {"torch", "torchrec", "numpy", "pydantic", "fbgemm_gpu"},
    "trainer": {"iopath", "torch", "torchrec", "fbgemm_gpu", "numpy", "pydantic", "tensorboard"}
    | {"boto3", "botocore", "urllib3", "onnx", "onnxruntime", "pyarrow", "safetensors", "uvicorn"},
}
# papilio doctor runs this one in a process of its own, to see whether torch, fbgemm and torchrec load.
PROBE = "launch.doctor.fbgemm_probe"
# Bytes are apart from policy: these alone know iopath, by which any storage is reached.
KNOW_IOPATH = {"data_pipeline.paths", "trainer.storage.s3", "trainer.storage.api"}


def module_name(path: Path) -> str:
    """The name of a module within papilio."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): ast.parse(path.read_text("utf-8")) for path in FILES}


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports, at its top or inside functions, but not for type checking only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("papilio.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            base = (node.module or "").removeprefix("papilio.")
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base
        else:
            yield from imports(node)


IMPORTS = {name: sorted(set(imports(tree))) for name, tree in MODULES.items()}


def test_there_is_something_to_check() -> None:
    assert {name.partition(".")[0] for name in MODULES} == {"benchmarks", *PACKAGES}
    assert "data_pipeline.schema" in IMPORTS["data_pipeline.manifest"]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_its_package_may(module: str) -> None:
    package = module.partition(".")[0]
    roots = {name.partition(".")[0] for name in IMPORTS[module]} - {package} - set(sys.stdlib_module_names)
    own, foreign = roots & {"benchmarks", *PACKAGES}, roots - {"benchmarks", *PACKAGES}
    assert own <= OWN_IMPORTS[package]
    if module != PROBE and package in FOREIGN_IMPORTS:
        assert foreign <= FOREIGN_IMPORTS[package]


def reached_from(module: str) -> set[str]:
    """A module and all that it imports, directly or not."""
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += IMPORTS.get(name, [])
    return reached


@pytest.mark.parametrize("module", ["trainer.inference.predict", "trainer.inference.serving.server"])
def test_serving_needs_no_torchrec(module: str) -> None:
    roots = {name.partition(".")[0] for name in reached_from(module)}
    assert "torch" in roots
    assert "torchrec" not in roots


def test_no_module_imports_itself_in_a_circle() -> None:
    state: dict[str, str] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != "open", f"import cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in state:
            state[name] = "open"
            for found in IMPORTS[name]:
                if found in MODULES:
                    visit(found, (*path, name))
            state[name] = "done"

    for name in MODULES:
        visit(name, ())


def test_few_modules_know_iopath() -> None:
    knowing = {name for name, found in IMPORTS.items() if any(root.startswith("iopath") for root in found)}
    assert knowing <= KNOW_IOPATH


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=module_name)
def test_importing_a_package_imports_nothing(path: Path) -> None:
    assert path.read_text("utf-8") == ""


@pytest.mark.parametrize("folder", PACKAGES)
def test_every_folder_is_in_the_package(folder: str) -> None:
    link = REPOSITORY / ".package" / "papilio" / folder
    assert link.is_symlink()
    assert link.resolve() == REPOSITORY / folder
    for path in (REPOSITORY / folder).rglob("*.py"):
        assert (path.parent / "__init__.py").exists(), f"{path.parent} is in no wheel without __init__.py"


def test_nothing_imports_tests_or_benchmarks() -> None:
    for name, found in IMPORTS.items():
        if not name.startswith("benchmarks"):
            assert {root.partition(".")[0] for root in found}.isdisjoint({"tests", "benchmarks"}), name
