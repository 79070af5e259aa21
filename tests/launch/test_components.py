import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.run
from torchx import specs
from torchx.specs import finder

from launch import components

REPOSITORY = Path(__file__).resolve().parents[2]
HEAD_NODE_VARIABLE = "HEAD_NODE_OF_THIS_TEST"


def resolve(app: specs.AppDef) -> specs.Role:
    """The role as a scheduler would start it."""
    values = specs.macros.Values(img_root="", app_id="job_7", replica_id="0", rank0_env=HEAD_NODE_VARIABLE)
    return values.apply(app.roles[0])


def test_one_node_is_started_without_a_shell_on_a_free_port() -> None:
    role = resolve(components.train("--train.epochs=2", "--name=$HOME", recipe="quickstart", nproc=3))
    assert role.entrypoint == sys.executable
    assert role.args == [
        "-m",
        "trainer.agent",
        "--nnodes=1",
        "--nproc-per-node=3",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        "--rdzv-conf=join_timeout=60",
        "--rdzv-id=job_7",
        "--rdzv-endpoint=localhost:0",
        "--tee=3",
        "--role=",
        "-m",
        "--",
        "trainer.train",
        "--recipe",
        "quickstart",
        "--train.epochs=2",
        "--name=$HOME",
    ]
    assert role.num_replicas == 1
    assert role.env["OMP_NUM_THREADS"] == "1"


def test_evaluate_passes_its_arguments_on() -> None:
    role = resolve(components.evaluate(run="runs/a", data="d", split="validation", nproc=1, omp_threads=4))
    assert role.args[-8:] == ["--", "trainer.evaluate", "--run", "runs/a", "--split", "validation", "--data", "d"]
    assert resolve(components.evaluate(run="runs/a")).args[-4:] == ["--run", "runs/a", "--split", "test"]
    assert role.env["OMP_NUM_THREADS"] == "4"


def test_export_is_one_process_without_ranks() -> None:
    app = components.export(
        run="runs/$a", output="p", quantize="auto", size_budget=0.2, table="t_*=int4,t_C1=fp16", data="d", gate=False
    )
    role = resolve(app)
    assert (role.entrypoint, role.num_replicas, role.resource.gpu) == (sys.executable, 1, 0)
    assert role.env["OMP_WAIT_POLICY"] == "passive"
    assert role.args == [
        "-m",
        "trainer.export",
        "--run=runs/$a",
        "--output=p",
        "--quantize=auto",
        "--quantizer=least_squares",
        "--min-auc-ratio=0.999",
        "--checkpoint=latest",
        "--size-budget=0.2",
        "--data=d",
        "--table=t_*=int4",
        "--table=t_C1=fp16",
        "--no-gate",
    ]


@pytest.mark.parametrize("nnodes", [1, 2])
def test_torchrun_leaves_the_modules_arguments_alone(nnodes: int) -> None:
    """`--run` is the beginning of two options of torchrun's own."""
    app = components.evaluate(run="runs/a", nnodes=nnodes)
    role = resolve(app)
    words = role.args if nnodes == 1 else shlex.split(role.args[1])
    after_launcher = words[words.index("trainer.agent") + 1 :]
    parsed = torch.distributed.run.parse_args(after_launcher)
    assert (parsed.module, parsed.training_script) == (True, "trainer.evaluate")
    assert parsed.training_script_args == ["--run", "runs/a", "--split", "test"]
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.tee) == (str(nnodes), "2", "3")


def run_two_node_role(tmp_path: Path, head_node: str | None) -> subprocess.CompletedProcess[str]:
    """Run the role's command with a stand-in for the interpreter that prints its arguments, one a line."""
    interpreter = tmp_path / "python of nowhere"
    interpreter.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    interpreter.chmod(0o755)
    role = resolve(
        components.train("--name=$HOME 'x'", recipe="r", nnodes="2", python=str(interpreter), rdzv_port=1234)
    )
    assert role.num_replicas == 2
    environment = {"PATH": "/usr/bin:/bin"} | ({} if head_node is None else {HEAD_NODE_VARIABLE: head_node})
    command = [role.entrypoint, *role.args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


@pytest.mark.parametrize("head_node", [None, ""])
def test_two_nodes_refuse_to_meet_at_localhost(tmp_path: Path, head_node: str | None) -> None:
    done = run_two_node_role(tmp_path, head_node)
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"the variable {HEAD_NODE_VARIABLE} is empty" in done.stderr
    assert f"export {HEAD_NODE_VARIABLE}=HOST on every node" in done.stderr


def test_two_nodes_meet_at_the_head_node(tmp_path: Path) -> None:
    done = run_two_node_role(tmp_path, "host-a")
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert "--rdzv-endpoint=host-a:1234" in words
    assert "--rdzv-id=job_7" in words
    assert "--nnodes=2" in words
    assert words[-5:] == ["--", "trainer.train", "--recipe", "r", "--name=$HOME 'x'"]


@pytest.mark.parametrize(("nproc", "nnodes"), [(0, "1"), (2, "0"), (2, "0:2")])
def test_no_ranks_is_refused(nproc: int, nnodes: str) -> None:
    with pytest.raises(ValueError, match=f"must be at least 1; got nproc = {nproc}, nnodes = {nnodes}"):
        components.train(recipe="r", nproc=nproc, nnodes=nnodes)


@pytest.mark.parametrize("nnodes", ["", "two", "1:", ":2", "3:2", "-1", "1:2:3"])
def test_a_number_of_nodes_that_is_none_is_refused(nnodes: str) -> None:
    with pytest.raises(ValueError, match=f"the fewest and the most, as in 4 or 2:4; got {nnodes}$"):
        components.train(recipe="r", nnodes=nnodes)


def test_an_elastic_job_notices_a_lost_node_soon() -> None:
    app = components.train(recipe="r", nnodes="1:3", max_restarts=5)
    role = resolve(app)
    assert (role.num_replicas, role.min_replicas) == (3, 1)
    words = shlex.split(role.args[1])
    parsed = torch.distributed.run.parse_args(words[words.index("trainer.agent") + 1 :])
    assert (parsed.nnodes, parsed.max_restarts) == ("1:3", 5)
    assert "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3" in parsed.rdzv_conf


def test_training_gets_time_to_save_and_restarts_and_evaluation_neither() -> None:
    train, evaluate = components.train(recipe="r"), components.evaluate(run="runs/a")
    assert train.roles[0].env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "25"
    assert components.train(recipe="r", grace_s=90).roles[0].env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "90"
    assert evaluate.roles[0].env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "5"
    assert "--max-restarts=3" in train.roles[0].args
    assert "--max-restarts=0" in evaluate.roles[0].args


def test_torchx_reads_the_component_file_and_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    component = finder.get_component(f"{REPOSITORY}/launch/components.py:train")
    app = specs.builders.materialize_appdef(component.fn, ["--recipe", "r", "--nproc", "4", "--", "--train.epochs=2"])
    assert resolve(app).args[-5:] == ["--", "trainer.train", "--recipe", "r", "--train.epochs=2"]
    assert "--nproc-per-node=4" in app.roles[0].args
    with pytest.raises(SystemExit):
        specs.builders.materialize_appdef(component.fn, ["--help"])
    assert "path of a .toml file, or the bare name" in " ".join(capsys.readouterr().out.split())


def test_submitting_needs_no_torch() -> None:
    code = "import launch.components, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60, check=True)
