import ast
import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("data_pipeline", "launch", "sharding", "trainer")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the checkout, where the build may leave its folders."""
    copy = tmp_path_factory.mktemp("checkout")
    sources = [path for package in PACKAGES for path in (REPOSITORY / package).rglob("*") if path.is_file()]
    projects = [REPOSITORY / name for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md")]
    for path in [*sources, *(path for path in projects if path.exists())]:
        if "__pycache__" not in path.parts:
            target = copy / path.relative_to(REPOSITORY)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    shutil.copytree(REPOSITORY / ".package", copy / ".package", symlinks=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(copy / "out"), "."], cwd=copy, timeout=120, check=True)
    (path,) = (copy / "out").glob("papilio-*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_has_every_module_and_recipe(wheel: zipfile.ZipFile) -> None:
    expected = {
        f"papilio/{path.relative_to(REPOSITORY)}"
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*")
        if path.suffix in {".py", ".toml", ".html", ".css", ".js", ".sh"}
    }
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected | {"papilio/__init__.py", "papilio/py.typed"}


def test_the_wheel_has_its_entry_points_and_license(wheel: zipfile.ZipFile) -> None:
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    entry_points = configparser.ConfigParser()
    entry_points.read_string(wheel.read(f"{folder}/entry_points.txt").decode())
    assert dict(entry_points["console_scripts"]) == {"papilio": "papilio.launch.command:main"}
    assert dict(entry_points["torchx.components"]) == {
        "papilio": "papilio.launch.command:components",
        "dist": "torchx.components.dist",
        "utils": "torchx.components.utils",
    }
    assert dict(entry_points["torchx.schedulers"]) == {
        "local_docker": "torchx.schedulers.docker_scheduler:create_scheduler",
        "slurm": "papilio.launch.command:create_slurm_scheduler",
    }
    assert "Apache License" in wheel.read(f"{folder}/licenses/LICENSE").decode()


def test_the_wheel_works_away_from_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    code = (
        "import papilio as i; from papilio.trainer.config_file import shipped_recipes, load_config\n"
        "[load_config(name) for name in shipped_recipes()]; print(i.__file__); print(*shipped_recipes())"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    module_file, recipes = done.stdout.rstrip("\n").split("\n")
    assert module_file.startswith(str(tmp_path))
    assert recipes.split() == sorted(path.stem for path in (REPOSITORY / "launch" / "recipes").glob("*.toml"))


def test_torchxs_own_components_stay_visible() -> None:
    """One entry of ours hides torchx's, so every module of torchx that holds components must be named again."""
    import torchx.components

    folder = Path(torchx.components.__file__).parent
    holders = {
        path.stem
        for path in folder.glob("*.py")
        if any(isinstance(node, ast.FunctionDef) and _returns_app(node) for node in ast.parse(path.read_text()).body)
    }
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    named = {line.split("=")[0].strip() for line in setup["options.entry_points"]["torchx.components"].splitlines()}
    assert holders <= named


def test_torchxs_default_scheduler_is_named_again_and_is_its_own() -> None:
    """One entry of ours comes before all of torchx's; entries are listed by name."""
    from torchx.schedulers import DEFAULT_SCHEDULER_MODULES

    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    lines = setup["options.entry_points"]["torchx.schedulers"].split("\n")[1:]
    named = dict(sorted(line.split(" = ") for line in lines))
    default, module = next(iter(DEFAULT_SCHEDULER_MODULES.items()))
    assert next(iter(named)) == default
    assert named[default] == f"{module}:create_scheduler"


def _returns_app(function: ast.FunctionDef) -> bool:
    return function.returns is not None and ast.unparse(function.returns).endswith("AppDef")
