"""The arguments of `papilio launch COMPONENT`, against what TorchX's own parser makes of the same words."""

import inspect

import pytest
from torchx import specs

from papilio.launch import components
from papilio.launch.component_arguments import build_app, our_components
from papilio.launch.usage import RefusedError, UsageError

TRAIN = ["--recipe", "quickstart", "--nproc", "3", "--nnodes", "2:4", "--rdzv_port", "1234", "--python", "python3"]


def words_of(app: specs.AppDef) -> list[str]:
    return list(app.roles[0].args)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train", [*TRAIN, "--env", "A=1,2,B=3", "--mounts", "type=bind,src=/a,dst=/b,readonly", "--", "--seed=2"]),
        ("evaluate", ["--run", "r", "--nnodes", "2", "--rdzv_port", "99"]),
        ("calibrate", ["--output", "o", "--quick", "true", "--fresh", "False"]),
        ("preprocess", ["--source", "criteo", "--input", "a,b", "--output", "o", "--", "--split", "days"]),
        ("export", ["--run", "r", "--output", "o", "--size_budget", "0.3", "--table", "a=int8,b=int4"]),
        ("dist.torchrun", ["--script", "x.py", "-j", "1x2"]),
    ],
)
def test_a_job_is_the_one_that_torchx_makes(name: str, words: list[str]) -> None:
    app = build_app(name, words)
    if name in our_components():
        expected = specs.materialize_appdef(our_components()[name], words)
        assert (app.name, app.roles) == (expected.name, expected.roles)
    else:
        assert "x.py" in " ".join(words_of(app))


def test_settings_may_stand_anywhere() -> None:
    app = build_app("train", ["--train.epochs=2", *TRAIN, "--data.path=a b", "--", "--seed=2"])
    assert words_of(app)[-3:] == ["--train.epochs=2", "--data.path=a b", "--seed=2"]


def test_two_jobs_do_not_meet_at_one_port() -> None:
    first, second = (build_app("papilio.train", ["--recipe", "quickstart", "--nnodes", "2"]) for _ in range(2))
    assert first.roles[0].port_map != second.roles[0].port_map


@pytest.mark.parametrize("name", sorted(our_components()))
def test_help_shows_every_argument_with_its_type(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_app(name, ["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    parameters = inspect.signature(our_components()[name]).parameters.values()
    for parameter in parameters:
        assert parameter.kind is inspect.Parameter.VAR_POSITIONAL or f"--{parameter.name} " in shown
    assert shown.count("(default: None)") == 0
    assert "python3" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --recipe"),
        (["--recipe", "quickstart", "--npro", "2"], "unknown argument --npro; did you mean --nproc?"),
        (["--recipe", "quickstart", "stray"], "unknown argument stray; settings of the recipe are written --section."),
        (["--recipe", "quickstart", "--nproc", "two"], "argument --nproc: 'two' is not a whole number"),
        (["--recipe", "quickstart", "--env", "A"], "argument --env: 'A' is not NAME=VALUE, or several with commas"),
    ],
)
def test_wrong_words_are_told_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_app("train", words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"papilio launch train: error: {message}")


def test_other_wrong_values_are_told_by_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--size_budget", "little"], "argument --size_budget: 'little' is not a number"),
        (["--gate", "maybe"], "argument --gate: 'maybe' is neither true nor false"),
    ):
        with pytest.raises(SystemExit):
            build_app("export", ["--run", "r", "--output", "o", *words])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trian", "there is no component trian; there are train, evaluate"),
        ("nothing.there", "Component `nothing.there` not found"),
    ],
)
def test_a_component_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_app(name, [])


def test_a_wrong_setting_is_found_before_the_job_waits_in_a_queue() -> None:
    with pytest.raises(RefusedError, match=r"no key train\.epoch; did you mean train\.epochs\?"):
        build_app("train", ["--recipe", "quickstart", "--", "--train.epoch=2"])


@pytest.mark.parametrize("mount", ["foo", "type=bnd,src=a,dst=b"])
def test_a_mount_that_cannot_be_read(mount: str) -> None:
    with pytest.raises(UsageError, match=rf"--mounts {mount}: .* as in type=volume,src=CLAIM,dst=FOLDER"):
        components.train(recipe="quickstart", mounts=mount.split(","))
