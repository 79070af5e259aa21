"""`papilio plan`: each flag reaches the process that plans, typed and as it was given."""

from types import SimpleNamespace

import pytest

from papilio.launch import cli
from papilio.launch.jobs import plan
from papilio.trainer.run.plan_options import PlanOptions

# What a shell gives for bytes that are no UTF-8.
NO_UTF8 = "caf\udce9.json"


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[PlanOptions]:
    """The options with which the process that plans was started."""
    started: list[PlanOptions] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        # An operating system takes no argument that it cannot write as bytes.
        started.append(PlanOptions.from_argument(command[-1].encode("ascii").decode()))
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(plan, "subprocess", SimpleNamespace(run=run))
    return started


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--hardware", "dgx_a100", "--num-nodes", "16"], {"hardware": "dgx_a100", "num_nodes": 16}),
        (["--ranks-per-node=4", "--explain", "t_C1"], {"ranks_per_node": 4, "explain": "t_C1"}),
        (["--output", NO_UTF8, "--html", "a b.html"], {"output": NO_UTF8, "html": "a b.html"}),
        (["--json", "--all"], {"as_json": True, "show_all": True}),
        (
            ["--train.epochs=2", "--hardware=dgx_a100", "--data.path=a b"],
            {"hardware": "dgx_a100", "overrides": ("--train.epochs=2", "--data.path=a b")},
        ),
    ],
)
def test_flags_reach_the_process_that_plans(
    arguments: list[str], expected: dict[str, object], planned: list[PlanOptions]
) -> None:
    assert cli.main(["plan", "--recipe", "quickstart", *arguments]) == 3
    assert planned == [PlanOptions(recipe="quickstart").model_copy(update=expected)]


def test_every_option_has_its_flag(planned: list[PlanOptions]) -> None:
    flags = ["--hardware=h", "--num-nodes=2", "--ranks-per-node=3", "--explain=t", "--output=o", "--html=p"]
    cli.main(["plan", "--recipe", "quickstart", *flags, "--json", "--all", "--train.epochs=2"])
    (options,) = planned
    assert options.model_fields_set == set(PlanOptions.model_fields)
    defaults = PlanOptions(recipe="").model_dump()
    assert all(value != defaults[name] for name, value in options.model_dump().items())
