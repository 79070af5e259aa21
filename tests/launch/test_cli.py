import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from papilio.launch import cli
from papilio.launch.verbs import VERBS, Verb

REPOSITORY = Path(__file__).resolve().parents[2]
LIST_TORCH_MODULES = """
import json, sys
from papilio.launch.cli import main
try:
    status = main(json.loads(sys.argv[1]))
except SystemExit as exit:
    status = exit.code
heavy = ("torch", "torchrec", "fbgemm_gpu", "torchx", "pyarrow")
print(json.dumps([status, sorted({name.partition(".")[0] for name in sys.modules} & set(heavy))]))
"""


def run_papilio(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "papilio.launch.cli", *arguments]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=60, check=False)


@pytest.mark.parametrize("arguments", [["--help"], *([verb.name, "--help"] for verb in VERBS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-c", LIST_TORCH_MODULES, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_help_has_an_example_that_parses(verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main([verb.name, "--help"])
    assert exit_info.value.code == 0
    assert verb.example in capsys.readouterr().out
    program, name, *arguments = verb.example.split()
    assert (program, name) == ("papilio", verb.name)
    cli.parse_arguments(verb, arguments)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_job_exists(verb: Verb) -> None:
    module_name, _, function_name = verb.job.partition(":")
    source = (REPOSITORY / ".package" / Path(*module_name.split("."))).with_suffix(".py").read_text()
    assert f"def {function_name}(" in source


def test_overview_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb.name} " in out and verb.summary in out for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tran"], "papilio: error: there is no verb tran; did you mean train?; `papilio --help` lists them"),
        (["train"], "papilio train: error: the following arguments are required: --recipe"),
        (["train", "--recipe", "r", "--nprocs=3"], "unknown argument --nprocs=3; did you mean --nproc?"),
        (["train", "--recipe", "r", "x"], "unknown argument x; settings of the recipe are written --section.key=value"),
        (["train", "--recipe", "r", "--nproc", "two"], "argument --nproc: invalid int value: 'two'"),
        (["train", "--recipe", "missing.toml"], "--recipe missing.toml does not exist; give the path of a file"),
        (["evaluate", "--run", "nowhere", "--data", "d"], "--run nowhere does not exist; `papilio train` makes one"),
        (["evaluate", "--run", ".", "--data", "d"], "--data d does not exist; `papilio preprocess` or"),
        (["preprocess", "--source", "criteo", "--input", "no.txt", "--output", "o"], "--input no.txt does not exist"),
        (["preprocess", "--source", "criteo", "--input", ".", "--output", "o"], "--input . is a folder, not a file"),
        (["preprocess", "--source", "table", "--input", "setup.cfg", "--output", "o"], "--source table needs --schema"),
        (["generate", "--shape", "criteo_small", "--rows", "0", "--output", "o"], "--rows 0: "),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(arguments: list[str], message: str) -> None:
    done = run_papilio(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_wrong_setting_is_found_before_any_rank_is_started(tmp_path: Path) -> None:
    recipe = tmp_path / "wrong.toml"
    recipe.write_text('name = "x"\n[data]\npath = "d"\n')
    done = run_papilio("train", "--recipe", str(recipe), "--train.epoch=2")
    assert done.returncode == 78
    assert done.stderr.startswith("papilio train: error: ")
    assert "there is no key train.epoch; did you mean train.epochs?" in done.stderr
    assert "Traceback" not in done.stderr


def test_overrides_are_gathered_in_order() -> None:
    verb = next(verb for verb in VERBS if verb.name == "train")
    words = ["--seed=3", "--recipe", "r", "--train.epochs=2", "--model.layers=[8, 1]", "--nproc", "4"]
    namespace = cli.parse_arguments(verb, words)
    assert namespace.overrides == ["--seed=3", "--train.epochs=2", "--model.layers=[8, 1]"]
    assert (namespace.recipe, namespace.nproc) == ("r", 4)


def test_a_setting_with_spaces_is_no_word_of_its_own() -> None:
    verb = next(verb for verb in VERBS if verb.name == "plan")
    setting = '--sharding.constraints=[{tables = ["t_C1"], types = ["row_wise"]}]'
    namespace = cli.parse_arguments(verb, ["--recipe", "r", setting, "--seed=2"])
    assert namespace.words == []
    assert namespace.overrides == [setting, "--seed=2"]


def test_a_closed_pipe_ends_without_a_traceback() -> None:
    command = f"{sys.executable} -m papilio.launch.cli train --help | head -c 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr


def test_plan_diff_needs_two_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["plan", "diff", "a.json"]) == 2
    assert "did you mean papilio plan diff OLD.json NEW.json?" in capsys.readouterr().err
    assert cli.main(["plan", "diff", "a.json", "b.json"]) == 2
    assert (
        "plan file a.json does not exist; papilio plan --recipe R --output a.json makes one" in capsys.readouterr().err
    )
    assert cli.main(["plan"]) == 2
    assert "--recipe is missing: papilio plan --recipe R --hardware H" in capsys.readouterr().err


def test_a_users_own_trainer_or_launch_is_neither_imported_nor_in_the_way(tmp_path: Path) -> None:
    for name in ("trainer", "sharding", "data_pipeline"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "launch.py").write_text("raise SystemExit('imported')")
    done = run_papilio("evaluate", "--run", ".", "--data", ".", cwd=tmp_path)
    assert done.returncode == 78
    assert done.stderr.startswith("papilio evaluate: error: . is not a run folder: it has no config.json")


def path_arguments() -> list[tuple[list[str], str, list[argparse.Action]]]:
    """The words that reach a verb (or the action below it), each of its arguments that is a path, and all of them."""
    found = []
    for verb in VERBS:
        parsers = [([verb.name], cli.parser_of(verb))]
        while parsers:
            words, parser = parsers.pop()
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    parsers += [([*words, name], child) for name, child in action.choices.items()]
                elif any(word in ("DIR", "FILE", "RUN", "RUN_DIR") for word in re.split(r"\W", str(action.metavar))):
                    found.append(
                        (words, action.option_strings[-1] if action.option_strings else action.dest, parser._actions)
                    )
    return found


TAKE_URIS = {
    *(f"checkpoint {action} run" for action in ("list", "show", "verify", "prune", "export-dense")),
    "checkpoint export-dense --output",
    "export --run",
}


@pytest.mark.parametrize("uri", ["s3://bucket/x", "S3://bucket/x", "gs://bucket/x", "s3:/x", "file:///x", "hdfs:/x"])
def test_a_path_in_object_storage_is_refused_where_it_would_be_a_folder_of_that_name(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = [(words, *rest) for words, *rest in path_arguments() if " ".join([*words, rest[0]]) not in TAKE_URIS]
    assert len(asked) > 20
    for words, name, actions in asked:
        rest = {"checkpoint": ["r"], "package": ["p"]}.get(words[0], [])
        required = [
            action
            for action in actions
            if action.required and action.option_strings and name not in action.option_strings
        ]
        given = [w for a in required for w in (a.option_strings[-1], sorted(a.choices)[0] if a.choices else "1")]
        last = [name, uri] if name.startswith("--") else [uri]
        with pytest.raises(SystemExit) as exit_info:
            cli.main([*words, *rest * name.startswith("--"), *given, *last])
        assert exit_info.value.code == 2
        assert f" = {uri}: object storage is not supported here; give a path on a local or shared disk" in (
            capsys.readouterr().err
        ), [*words, name]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "key", ["data.path", "data.shape", "output.run_dir", "output.runs_dir", "sharding.plan", "sharding.hardware"]
)
def test_a_setting_in_object_storage_is_refused(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--recipe", "quickstart", f"--{key}=s3://bucket/x"]) == 78
    assert capsys.readouterr().err.startswith(
        f"papilio train: error: quickstart: {key} = s3://bucket/x: object storage is not supported here; give a path"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            KeyError("t_3"),
            r"internal error: KeyError: 't_3' \(a fault of Papilio; its traceback is in (\S+): please report",
        ),
        (OSError(36, "File name too long", "/x/yyy"), "File name too long: /x/yyy$"),
        (PermissionError(13, "Permission denied", "/x\n/y"), "Permission denied: /x /y$"),
    ],
)
def test_what_nobody_foresaw_is_one_line_and_its_traceback_a_file(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(namespace: argparse.Namespace) -> int:
        raise error

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("papilio.launch.jobs.data.run_generate", fail)
    assert cli.main(["generate", "--rows", "1", "--output", "o"]) == 1
    shown = capsys.readouterr().err.strip()
    found = re.fullmatch(rf"papilio generate: error: .*{message}.*|papilio generate: error: {message}", shown)
    assert found is not None, shown
    reports = list((tmp_path / "papilio/crashes").glob("*.txt")) if "internal" in message else []
    assert all("Traceback (most recent call last)" in report.read_text() for report in reports)
    assert bool(reports) == ("internal" in message)
