import inspect
from pathlib import Path

import pytest

from papilio.launch import components
from papilio.launch.component_arguments import our_components
from papilio.launch.host_request import HostRequest, largest, request_host
from papilio.launch.usage import UsageError
from papilio.sharding.hardware import HardwareError, load_hardware, profile_names
from papilio.trainer.config_file import load_config

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("host", "nproc", "cpu", "gpu", "memory_mb"),
    [
        # Nine tenths of the data sheets' 256 and 2048 GiB; cores as in the data sheets.
        ("big_basin_v100", 8, 40, 8, 235_929),
        ("dgx_a100", 8, 128, 8, 1_887_436),
        ("dgx_h100", 8, 112, 8, 1_887_436),
        ("dgx_h200", 8, 112, 8, 1_887_436),
        ("cpu_host", 32, 32, 0, 471_859),
    ],
)
def test_a_job_asks_for_what_the_profile_has(host: str, nproc: int, cpu: int, gpu: int, memory_mb: int) -> None:
    assert request_host(host) == HostRequest(nproc, cpu, gpu, memory_mb, host)
    app = components.train(recipe="r", host=host)
    resource = app.roles[0].resource
    assert (resource.cpu, resource.gpu, resource.memMB) == (cpu, gpu, memory_mb)
    assert f"--nproc-per-node={nproc}" in app.roles[0].args
    assert app.roles[0].args[-1] == f"--host={host}"


def test_every_profile_says_what_a_host_has() -> None:
    for name in profile_names():
        assert request_host(name).cpu > 0


def test_a_job_may_ask_for_less() -> None:
    asked = request_host("dgx_h100", nproc="4", cpu="56", memory_mb=1000)
    assert asked == HostRequest(4, 56, 4, 1000, "dgx_h100")


def test_without_a_profile_a_rank_gets_a_core_for_each_of_its_threads() -> None:
    assert request_host(None) == HostRequest(2, 2, 0, 4096, None)
    assert request_host(None, nproc=3, omp_threads=4).cpu == 12
    assert not any(word.startswith("--host=") for word in components.train(recipe="r").roles[0].args)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"nproc": 9}, "--nproc 9: a host dgx_h100 has 8; ask for less, for more hosts"),
        ({"cpu": 500}, "--cpu 500: a host dgx_h100 has 112"),
        ({"memory_mb": 3_000_000}, "--memory_mb 3000000: a host dgx_h100 has 2097152"),
        ({"nproc": 8, "gpu": 4}, "--nproc 8 with --gpu 4: each rank needs a GPU of its own"),
        ({"nproc": "many"}, "--nproc many: a whole number is needed"),
    ],
)
def test_more_than_a_host_has_is_refused(asked: dict[str, int | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request_host("dgx_h100", **asked)


def test_the_largest_of_numbers_given_as_text() -> None:
    assert largest("--ranks", ["2", "10", "4"]) == 10
    assert largest("--ranks", None) is None
    with pytest.raises(UsageError, match="--ranks two: a whole number is needed"):
        largest("--ranks", ["1", "two"])


def test_an_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(HardwareError, match="hardware dgx_h10: no such profile or file; did you mean dgx_h100"):
        components.train(recipe="r", host="dgx_h10")


def test_an_older_file_without_cores_says_what_to_add(tmp_path: Path) -> None:
    text = (REPOSITORY / "sharding/profiles/dgx_h100.toml").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("host_cores")]
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    assert load_hardware(str(tmp_path / "mine.toml")).host_cores is None
    with pytest.raises(HardwareError, match="does not say how many cores a host has: give --cpu, or add"):
        request_host(str(tmp_path / "mine.toml"))
    assert request_host(str(tmp_path / "mine.toml"), cpu=12).cpu == 12


def test_the_plan_is_made_for_the_hosts_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    assert load_config("quickstart", (), "dgx_h100").sharding.hardware == "dgx_h100"
    assert load_config("quickstart", ("--sharding.hardware=dgx_a100",), "dgx_h100").sharding.hardware == "dgx_a100"
    recipe = tmp_path / "r.toml"
    recipe.write_text('name = "r"\n[data]\npath = "d"\n[sharding]\nhardware = "dgx_h200"\n')
    assert load_config(str(recipe), (), "dgx_h100").sharding.hardware == "dgx_h200"
    assert load_config("quickstart").sharding.hardware is None


MINIMAL: dict[str, dict[str, object]] = {
    "train": {"recipe": "r"},
    "evaluate": {"run": "r"},
    "calibrate": {"output": "o"},
    "preprocess": {"source": "criteo", "input": ["i"], "output": "o"},
    "export": {"run": "r", "output": "o"},
    "predict": {"package": "p", "output": "o"},
    "study": {"recipe": "r", "output": "o"},
    "preflight": {"recipe": "r"},
}
# What is too small for each number that a component may take, and the flag's allowed range.
TOO_SMALL = {
    **{"nproc": 0, "nnodes": 0, "cpu": -1, "gpu": -2, "memory_mb": 0, "omp_threads": 0, "max_retries": -1},
    **{"rdzv_port": 0, "max_restarts": -1, "grace_s": 0, "wait_s": -5.0},
}
TOO_LARGE = {
    "nproc": 10**6,
    "nnodes": 10**7,
    "cpu": 10**9,
    "memory_mb": 10**12,
    "rdzv_port": 65_536,
    "wait_s": float("nan"),
}


@pytest.mark.parametrize("name", sorted(MINIMAL))
def test_every_component_refuses_every_number_that_is_none(name: str) -> None:
    """Given as a number, and as text, as TorchX gives what may be None."""
    component = our_components()[name]
    assert sorted(MINIMAL) == sorted(our_components())
    component(**MINIMAL[name])
    parameters = inspect.signature(component).parameters
    for flag, value in [*TOO_SMALL.items(), *TOO_LARGE.items()]:
        if flag not in parameters:
            continue
        given = str(value) if parameters[flag].annotation is str or parameters[flag].default is None else value
        with pytest.raises(UsageError, match=rf"^--{flag} \S+: a number from \d+ to [\d,]+ is needed$"):
            component(**MINIMAL[name], **{flag: given})


def test_words_that_the_job_would_refuse_are_refused_before_it_waits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--split day_1: one of train, validation, test is needed"):
        components.evaluate(run="r", split="day_1")
    with pytest.raises(UsageError, match="--ranks 0: a number from 1 to 1,024 is needed"):
        components.study(recipe="r", output="o", ranks=["0", "2"])
    with pytest.raises(SystemExit):
        components.predict("p", "o", split="day_1")
    assert "papilio predict: error: argument --split: invalid choice: 'day_1'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a" * 201])
def test_a_name_that_nobody_can_read_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"^--name '.*': 1 to 200 letters that can be printed are needed$"):
        components.train(recipe="r", name=name)
