"""Every verb, with each of its paths leading to something bad: for tests/end_to_end/test_bad_paths.py.

    python -m tests.support.bad_paths FOLDER

Prints a line of JSON for each try: [what was tried, exit status, what was printed]. Verbs run in this process, and so
do those that run in a process of their own, which saves starting hundreds; where ranks would be started, a try ends.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from papilio.launch import cli
from tests.support.scored_runs import write_scored_run
from tests.support.served import SCHEMA, records_of, text_rows, write_package

RANKS_STARTED = 99
DEEP = 100_000
DAMAGES: dict[str, Callable[[bytes], bytes] | bytes] = {
    "empty": b"",
    "cut": lambda data: data[: len(data) // 2],
    "zeros": b"\0" * 50,
    "bytes": b"\xff\xfe{",
    "deep": b"[" * DEEP,
    "digits": b'{"format_version": ' + b"9" * 5_000 + b"}",
    "null": b"null",
    "list": b"[]",
    "object": b"{}",
    "types": lambda data: data.replace(b": 1", b': "one"').replace(b": [", b': {"x": [').replace(b"]", b"]}"),
}


def bad_paths(folder: Path) -> dict[str, str]:
    """Things that are neither a data set nor a run, a package, a recipe, a plan, a table..."""
    folder.mkdir()
    paths = {
        "missing": folder / "none",
        "folder": folder / "dir",
        "loop": folder / "loop",
        "long": folder / ("n" * 300),
    }
    paths["folder"].mkdir()
    paths["loop"].symlink_to("loop")
    for name, data in DAMAGES.items():
        if isinstance(data, bytes):
            paths[name] = folder / name
            paths[name].write_bytes(data)
    (folder / "toml").write_bytes(b"a = " + b"[" * DEEP)
    (folder / "text").write_bytes(b"hello world\n" * 3)
    paths |= {"toml": folder / "toml", "text": folder / "text", "below a file": folder / "text" / "x"}
    return {name: str(path) for name, path in paths.items()}


def damaged(source: Path, folder: Path, file: str) -> dict[str, str]:
    """Copies of a folder, one of whose files is damaged in each of the ways, or missing."""
    copies = {}
    for name, damage in {**DAMAGES, "gone": None}.items():
        copy = folder / f"{source.name}-{Path(file).name}-{name}"
        shutil.copytree(source, copy)
        if damage is None:
            (copy / file).unlink()
        else:
            data = (copy / file).read_bytes()
            (copy / file).write_bytes(damage(data) if callable(damage) else damage)
        copies[f"{Path(file).name} {name}"] = str(copy)
    return copies


def write_table(folder: Path) -> tuple[Path, Path]:
    """A table of a few rows, and its schema."""
    table, schema = folder / "table.csv", folder / "schema.toml"
    table.write_text("\n".join(text_rows(records_of(0, 5), label=True)) + "\n")
    schema.write_text(f'label = "{SCHEMA.label}"\n[[categorical]]\nname = "{SCHEMA.categorical[0].name}"\n')
    return table, schema


def commands(folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    """Command lines with an @ where a path stands and every other argument right, each with the paths to try there."""
    data, run, package = (
        Path(path) for path in (*write_scored_run(folder / "made")[:2], write_package(folder / "p", 1))
    )
    table, schema = write_table(folder)
    copies = folder / "damaged"
    copies.mkdir()
    (checkpoint,) = (path.name for path in (run / "checkpoints").iterdir())
    bad = bad_paths(folder / "bad")
    sets = bad | damaged(data, copies, "manifest.json")
    runs = bad | damaged(run, copies, "config.json")
    for file in ("checkpoint.json", "index.json"):
        runs |= damaged(run, copies, f"checkpoints/{checkpoint}/{file}")
    packages = bad | damaged(package, copies, "package.json") | damaged(package, copies, "schema.json")
    no_output = {name: bad[name] for name in ("text", "loop", "long", "below a file")}
    out, recipe = str(folder / "out"), ["--recipe", "small_data"]
    with_data = [*recipe, f"--data.path={data}"]
    preprocess = ["preprocess", "--source", "table"]
    return [
        ([*preprocess, "--schema", str(schema), "--output", out, "--input", "@"], bad),
        (["preprocess", "--source", "criteo", "--output", out, "--input", "@"], bad),
        ([*preprocess, "--input", str(table), "--output", out, "--schema", "@"], bad),
        (
            ["preprocess", "--source", "table", "--schema", str(schema), "--input", str(table), "--output", "@"],
            no_output,
        ),
        (["generate", "--rows", "100", "--output", out, "--shape", "@"], bad),
        (["generate", "--rows", "100", "--output", "@"], no_output),
        (["train", "--recipe", "@"], bad),
        (["train", *recipe, f"--output.run_dir={out}", "--data.path=@"], sets),
        (["train", *with_data, f"--output.run_dir={out}", "--sharding.plan=@"], bad),
        (["train", *with_data, f"--output.run_dir={out}", "--sharding.hardware=@"], bad),
        (["train", *with_data, "--output.run_dir=@"], no_output),
        (["plan", "--hardware", "cpu_laptop", "--recipe", "@"], bad),
        (["plan", "--hardware", "cpu_laptop", *recipe, "--data.path=@"], sets),
        (["plan", *with_data, "--hardware", "@"], bad),
        (["plan", "--hardware", "cpu_laptop", *recipe, "--data.path=none", "--data.shape=@"], bad),
        (["plan", "diff", "@", "@"], bad),
        (["evaluate", "--run", "@"], runs),
        (["evaluate", "--run", str(run), "--data", "@"], sets),
        (["checkpoint", "list", "@"], bad),
        (["checkpoint", "verify", "@"], bad),
        (["checkpoint", "export-dense", "@", "--output", out], runs),
        (["export", "--output", out, "--run", "@"], runs),
        (["export", "--run", str(run), "--output", out, "--data", "@"], sets),
        (["package", "show", "@"], packages),
        (["package", "verify", "@"], packages),
        (["package", "build", "--format", "torch", "@"], packages),
        (["predict", "--source", "table", "--input", str(table), "--output", out, "--package", "@"], packages),
        (["predict", "--package", str(package), "--source", "table", "--output", out, "--input", "@"], bad),
        (["predict", "--package", str(package), "--output", out, "--data", "@"], sets),
        (["serve", "--package", "@"], packages),
        (["status", "@"], bad),
        (["study", "--output", out, "--recipe", "@"], bad),
        (["preflight", "--recipe", "@"], bad),
        (["launch", "--dryrun", "train", "--recipe", "@"], bad),
    ]


def tries(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """What to call each try, and its command line."""
    for words, corpus in commands(folder):
        for name, path in corpus.items():
            yield (
                f"{' '.join(words[:2])} {words[-1] if words[-1] != '@' else words[-2]}: {name}",
                [word.replace("@", path) for word in words],
            )


def run(words: list[str]) -> tuple[int, str]:
    """Run a command line here; return its exit status and all that it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            status = cli.main(words)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
    return status, printed.getvalue()


def in_this_process(module: str, arguments: list[str]) -> int:
    """Do what `python -m module` would."""
    return int(importlib.import_module(module).main(arguments))


def a_process(command: list[str], **_: object) -> SimpleNamespace:
    """A stand-in for `subprocess.run` of a module of ours."""
    place = command.index("-m")
    return SimpleNamespace(returncode=in_this_process(command[place + 1], command[place + 2 :]))


def start_nothing(*_: object, **__: object) -> int:
    """A stand-in for whatever would start ranks or a server."""
    print("error: they were started")
    return RANKS_STARTED


def main(folder: str) -> None:
    """Try everything."""
    with contextlib.ExitStack() as patches:
        for name, stand_in in {
            "papilio.launch.jobs.package.run_module": in_this_process,
            "papilio.launch.jobs.serving.run_module": in_this_process,
            "papilio.launch.jobs.plan.subprocess": SimpleNamespace(run=a_process),
            "papilio.launch.jobs.serving.os.execv": lambda *_: sys.exit(start_nothing()),
            "papilio.launch.jobs.local.run_locally": start_nothing,
            "papilio.launch.jobs.study.run_locally": start_nothing,
            "papilio.launch.jobs.preflight.subprocess": SimpleNamespace(run=start_nothing, Popen=start_nothing),
        }.items():
            patches.enter_context(mock.patch(name, stand_in))
        os.chdir(folder)
        for what, words in tries(Path(folder)):
            print(json.dumps([what, *run(words)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
