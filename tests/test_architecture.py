"""The rules of CONTRIBUTING.md that a syntax tree can check."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("benchmarks", "data_pipeline", "launch", "sharding", "trainer")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
FILES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
# What a package may import of the others; every package may import itself and the standard library.
OWN_IMPORTS = {
    "benchmarks": set(PACKAGES),
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
# papilio doctor runs this one in a process of its own, to see whether the trio loads.
PROBE = "launch.fbgemm_probe"
# Bytes are apart from policy: these alone know iopath, by which any storage is reached.
KNOW_IOPATH = {"data_pipeline.paths", "trainer.s3_storage", "trainer.storage"}
# The jobs that launch starts in its own process: they import no torch (tests/launch/test_cli.py looks).
JOBS_OF_LAUNCH = {
    "data_pipeline.crash",
    "data_pipeline.generate",
    "data_pipeline.local_path",
    "data_pipeline.paths",
    "data_pipeline.preprocess",
    "data_pipeline.progress",
    "data_pipeline.terminal",
    "data_pipeline.verification",
    "sharding.reports.diff",
    "sharding.reports.figures",
    "trainer.addresses",
    "trainer.checkpoint.compatibility",
    "trainer.checkpoint.contents",
    "trainer.checkpoint.export",
    "trainer.checkpoint.folder",
    "trainer.checkpoint.format",
    "trainer.checkpoint.places",
    "trainer.inference.formats.format_folder",
    "trainer.inference.package",
    "trainer.live.view",
    "trainer.memory_limit",
    "trainer.progress",
    "trainer.retries",
    "trainer.run_lock",
    "trainer.start_checks",
    "trainer.storage",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): ast.parse(path.read_text("utf-8")) for path in FILES}


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports, at its top or inside functions, but not for type checking only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base
        else:
            yield from imports(node)


IMPORTS = {name: sorted(set(imports(tree))) for name, tree in MODULES.items()}


def test_there_is_something_to_check() -> None:
    assert {name.partition(".")[0] for name in MODULES} == set(PACKAGES)
    assert "data_pipeline.schema" in IMPORTS["data_pipeline.manifest"]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_its_package_may(module: str) -> None:
    package = module.partition(".")[0]
    roots = {name.partition(".")[0] for name in IMPORTS[module]} - {package} - set(sys.stdlib_module_names)
    own, foreign = roots & set(PACKAGES), roots - set(PACKAGES)
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
            waiting += [found for found in IMPORTS.get(name, []) if found != PROBE]
    return reached


@pytest.mark.parametrize("module", ["trainer.inference.predict", "trainer.inference.serving.server"])
def test_serving_needs_no_torchrec(module: str) -> None:
    roots = {name.partition(".")[0] for name in reached_from(module)}
    assert "torch" in roots
    assert "torchrec" not in roots


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("launch")))
def test_launch_reaches_no_torch(module: str) -> None:
    """Of the other packages launch imports configs, options, exit codes, the install check and torch-free jobs."""
    reached = reached_from(module) if module != PROBE else set()
    heavy = {name for name in reached if name.partition(".")[0] in ("torch", "torchrec", "fbgemm_gpu")}
    assert heavy == set()
    direct = {name for name in IMPORTS[module] if name.partition(".")[0] in ("data_pipeline", "sharding", "trainer")}
    allowed = ("bootstrap", "config", "config_file", "exit_codes", "hardware", "install", "manifest", "plan_file")
    assert all(n.rpartition(".")[2] in allowed or n.endswith("_options") or n in JOBS_OF_LAUNCH for n in direct)


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


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_sizes(path: Path) -> None:
    text = path.read_text("utf-8")
    if path.name == "__init__.py":
        assert text == "", "importing a package must import nothing"
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or 0) - node.lineno + 1
            assert num_lines <= MAX_FUNCTION_LINES, f"{node.name} has {num_lines} lines"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_module_has_a_name_of_the_standard_library(path: Path) -> None:
    assert path.stem == "__init__" or path.stem not in sys.stdlib_module_names


def test_nothing_imports_tests_or_benchmarks() -> None:
    for name, found in IMPORTS.items():
        if not name.startswith("benchmarks"):
            assert {root.partition(".")[0] for root in found}.isdisjoint({"tests", "benchmarks"}), name
