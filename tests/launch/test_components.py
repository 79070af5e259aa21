import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.run
from torchx import specs
from torchx.specs import finder

from papilio.launch import components, start
from papilio.launch.cli import parse_arguments
from papilio.launch.preflight.worker import read_options
from papilio.launch.schedulers.kubernetes.scheduler import with_local_files
from papilio.launch.usage import UsageError
from papilio.launch.verbs import VERBS
from papilio.trainer.elastic import bootstrap

REPOSITORY = Path(__file__).resolve().parents[2]
HEAD_NODE_VARIABLE = "HEAD_NODE_OF_THIS_TEST"


def resolve(app: specs.AppDef) -> specs.Role:
    """The role as a scheduler would start it."""
    values = specs.macros.Values(img_root="", app_id="job_7", replica_id="0", rank0_env=HEAD_NODE_VARIABLE)
    return values.apply(app.roles[0])


def after_agent(role: specs.Role) -> list[str]:
    return role.args[role.args.index("papilio.trainer.elastic.agent") + 1 :]


def test_one_node_is_started_without_a_shell_on_a_free_port() -> None:
    role = resolve(components.train("--train.epochs=2", "--name=home", recipe="quickstart", nproc=3))
    assert role.entrypoint == sys.executable
    assert role.args == [
        bootstrap.FILE,
        "-m",
        "papilio.trainer.elastic.agent",
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
        "papilio.trainer.train",
        "--recipe",
        "quickstart",
        "--train.epochs=2",
        "--name=home",
    ]
    assert role.num_replicas == 1
    assert role.env["OMP_NUM_THREADS"] == "1"


def test_evaluate_passes_its_arguments_on() -> None:
    role = resolve(components.evaluate(run="runs/a", data="d", split="validation", nproc=1, omp_threads=4))
    assert role.args[-8:] == [
        "--",
        "papilio.trainer.run.evaluate_run",
        "--run",
        "runs/a",
        "--split",
        "validation",
        "--data",
        "d",
    ]
    assert resolve(components.evaluate(run="runs/a")).args[-4:] == ["--run", "runs/a", "--split", "test"]
    assert resolve(components.evaluate(run="runs/a", checkpoint="best")).args[-2:] == ["--checkpoint", "best"]
    assert role.env["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize("nnodes", [1, 2])
def test_torchrun_leaves_the_modules_arguments_alone(nnodes: int) -> None:
    """`--run` is the beginning of two options of torchrun's own."""
    app = components.evaluate(run="runs/a", nnodes=nnodes)
    role = resolve(app)
    parsed = torch.distributed.run.parse_args(after_agent(role))
    assert (parsed.module, parsed.training_script) == (True, "papilio.trainer.run.evaluate_run")
    assert parsed.training_script_args == ["--run", "runs/a", "--split", "test"]
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.tee) == (str(nnodes), "2", "3")


# What a host runs before the agent.
COPIED = (
    "launch/start.py",
    "trainer/elastic/bootstrap.py",
    "trainer/elastic/exit_codes.py",
    "data_pipeline/crash.py",
    "data_pipeline/errors.py",
    "data_pipeline/terminal.py",
)


def run_role(tmp_path: Path, app: specs.AppDef, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the role's command with a stand-in for the agent that prints its arguments and its environment."""
    home = tmp_path / "papilio"
    for package in ("", "launch", "trainer", "trainer/elastic", "data_pipeline"):
        (home / package).mkdir(parents=True, exist_ok=True)
        (home / package / "__init__.py").touch()
    for name in COPIED:
        (home / name).write_text((REPOSITORY / name).read_text("utf-8"))
    agent = "import json, os, sys\njson.dump({'words': sys.argv[1:], 'env': dict(os.environ)}, sys.stdout)\n"
    (home / "trainer/elastic/agent.py").write_text(agent)
    role = resolve(app)
    return subprocess.run(
        [role.entrypoint, str(home / "trainer/elastic/bootstrap.py"), *role.args[1:]],
        capture_output=True,
        text=True,
        env={**role.env, **environment},
        cwd=tmp_path,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("environment", [{}, {HEAD_NODE_VARIABLE: ""}])
def test_two_nodes_refuse_to_meet_at_localhost(tmp_path: Path, environment: dict[str, str]) -> None:
    done = run_role(tmp_path, components.train(recipe="r", nnodes="2"), environment)
    assert done.returncode == 78
    assert done.stdout == ""
    assert f"the variable {HEAD_NODE_VARIABLE} is empty" in done.stderr
    assert f"export {HEAD_NODE_VARIABLE}=HOST on every node" in done.stderr


def test_two_nodes_meet_at_the_head_node(tmp_path: Path) -> None:
    app = components.train("--name=$HOME 'x'", recipe="r", nnodes="2", rdzv_port=1234)
    assert app.roles[0].num_replicas == 2
    done = run_role(tmp_path, app, {HEAD_NODE_VARIABLE: "host-a"})
    assert done.returncode == 0, done.stderr
    words = json.loads(done.stdout)["words"]
    parsed = torch.distributed.run.parse_args(words)
    assert (parsed.rdzv_endpoint, parsed.rdzv_id, parsed.nnodes) == ("host-a:1234", "job_7", "2")
    assert words[-5:] == ["--", "papilio.trainer.train", "--recipe", "r", "--name=$HOME 'x'"]


@pytest.mark.parametrize("status", [0, 1, 78])
def test_a_preflight_comes_first_meets_where_the_job_will_and_may_end_it(tmp_path: Path, status: int) -> None:
    worker = f"import json, sys\njson.dump(sys.argv[1:], open('asked', 'w'))\nsys.exit({status})\n"
    (tmp_path / "papilio/launch/preflight").mkdir(parents=True)
    (tmp_path / "papilio/launch/preflight/worker.py").write_text(worker)
    app = components.train("--name=it's $HOME", recipe="r", nnodes="2", nproc=3, rdzv_port=1234, preflight=True)
    done = run_role(tmp_path, app, {HEAD_NODE_VARIABLE: "host-a"})
    options = read_options(json.loads((tmp_path / "asked").read_text()))
    assert (options.recipe, options.overrides, options.nnodes, options.nproc) == ("r", ("--name=it's $HOME",), 2, 3)
    assert (options.rdzv_endpoint, options.index, options.job) == ("host-a:1234", 0, "job_7")
    assert (options.wait_s, options.failure_status) == (900, 78)
    assert done.returncode == status
    assert ("papilio.trainer.train" in done.stdout) == (status == 0)
    assert ("the checks before the job failed, the log of host 0 says why; nothing was started" in done.stderr) == (
        status != 0
    )


def test_a_preflight_asks_a_fixed_number_of_nodes() -> None:
    with pytest.raises(UsageError, match="--preflight with --nnodes 2:4: it asks a fixed number of nodes"):
        components.train(recipe="r", nnodes="2:4", preflight=True)


def test_values_that_schedulers_cut_travel_in_the_command(tmp_path: Path) -> None:
    values = {"PLAIN": "/a/b.c:1", "COMMAS": "1,2,3", "SPACES": "a b", "DOLLARS": "$(HOME)${app_id}", "LINES": "a\nb"}
    app = components.train(recipe="r", env=values)
    assert set(app.roles[0].env) & set(values) == {"PLAIN"}
    done = run_role(tmp_path, app, {})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["env"]
    assert {name: found[name] for name in values} == values


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"A-B": "1"}, "'A-B' is not a variable's name"),
        ({"OMP_NUM_THREADS": "2"}, "say it with --omp_threads"),
        ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"}, "say it with --grace_s"),
    ],
)
def test_variables_that_would_be_lost_or_contradict_are_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        components.train(recipe="r", env=env)


def test_a_mount_that_the_scheduler_dropped_ends_the_job_before_it_starts(tmp_path: Path) -> None:
    mounts = ["type=volume", "src=claim", f"dst={tmp_path}/data"]
    done = run_role(tmp_path, components.train(recipe="r", mounts=mounts), {})
    assert done.returncode == 78
    assert f"nothing is mounted on {tmp_path}/data, though the job asks for it (--mounts)" in done.stderr
    assert "local_cwd and slurm mount nothing" in done.stderr
    done = run_role(tmp_path, components.train(recipe="r", mounts=["type=bind", "src=/x", "dst=/proc"]), {})
    assert done.returncode == 0, done.stderr


def test_a_dollar_arrives_as_it_was_written_without_being_sent(tmp_path: Path) -> None:
    """The kubelet puts the value of NAME in the place of $(NAME) in a command, and $ in the place of $$."""
    text = "$(HOME) $$ $HOME _DOLLAR0_ '$x'"
    app = components.train(f"--name={text}", recipe="r", env={"TEXT": text, "UID": "7"})
    assert not any("$" in word for word in resolve(app).args)
    done = run_role(tmp_path, app, {})
    told = json.loads(done.stdout)
    assert told["words"][-1] == f"--name={text}"
    assert (told["env"]["TEXT"], told["env"]["UID"]) == (text, "7")


def test_a_recipe_that_came_along_is_there_for_the_job_and_its_checks(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("name = 'it is $x'\n")
    worker = "import sys\nprint(sys.argv[sys.argv.index('--recipe') + 1], file=sys.stderr)\n"
    (tmp_path / "job/papilio/launch/preflight").mkdir(parents=True)
    (tmp_path / "job/papilio/launch/preflight/worker.py").write_text(worker)
    app = components.train("--name=$x", recipe=str(tmp_path / "a.toml"), nnodes="2", preflight=True)
    app.roles[0].args = with_local_files(app.roles[0])
    (tmp_path / "a.toml").rename(tmp_path / "gone.toml")
    done = run_role(tmp_path / "job", app, {HEAD_NODE_VARIABLE: "h", "TMPDIR": str(tmp_path)})
    path, override = json.loads(done.stdout)["words"][-2:]
    assert (done.stderr.strip(), override) == (path, "--name=$x")
    assert Path(path).read_text() == "name = 'it is $x'\n"


def test_a_file_that_came_along_is_named_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    there = start.write_files(["/home/me/a:b.toml:bmFtZSA9ICJ4Igo="])
    path = there["/home/me/a:b.toml"]
    assert Path(path).read_text() == 'name = "x"\n'
    words = ["--recipe", "/home/me/a:b.toml", "--host=/home/me/a:b.toml", "x=/home/me/a:b.toml"]
    assert [start.with_files(word, there) for word in words] == ["--recipe", path, f"--host={path}", words[3]]


def test_mount_points_are_read_as_the_kernel_writes_them() -> None:
    mountinfo = "36 35 98:0 /mnt1 /with\\040space rw,noatime master:1 - ext3 /dev/root rw\n"
    start.check_mounts(["/with space", "/with space/"], mountinfo)
    with pytest.raises(start.StartError, match="nothing is mounted on /with,"):
        start.check_mounts(["/with"], mountinfo)


def test_an_image_has_its_own_interpreter() -> None:
    assert components.train(recipe="r").roles[0].entrypoint == sys.executable
    role = components.train(recipe="r", image="registry/papilio:1").roles[0]
    assert role.entrypoint == "python3"
    assert role.args[:5] == ["-P", "-m", "papilio.trainer.elastic.bootstrap", "-m", "papilio.trainer.elastic.agent"], (
        "where the image has it"
    )
    assert components.train(recipe="r", image="registry/papilio:1", python="/py").roles[0].entrypoint == "/py"


@pytest.mark.parametrize(("nproc", "nnodes"), [(0, "1"), (2, "0"), (2, "0:2")])
def test_no_ranks_is_refused(nproc: int, nnodes: str) -> None:
    with pytest.raises(ValueError, match=r"--(nproc|nnodes) 0: a number from 1 to [\d,]+ is needed"):
        components.train(recipe="r", nproc=nproc, nnodes=nnodes)


@pytest.mark.parametrize("nnodes", ["", "two", "1:", ":2", "3:2", "-1", "1:2:3"])
def test_a_number_of_nodes_that_is_none_is_refused(nnodes: str) -> None:
    with pytest.raises(ValueError, match=f"the fewest and the most, as in 4 or 2:4; got {nnodes}$"):
        components.train(recipe="r", nnodes=nnodes)


def test_an_elastic_job_notices_a_lost_node_soon() -> None:
    app = components.train(recipe="r", nnodes="1:3", max_restarts=5)
    role = resolve(app)
    assert (role.num_replicas, role.min_replicas) == (3, 1)
    parsed = torch.distributed.run.parse_args(after_agent(role))
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
    assert resolve(app).args[-5:] == ["--", "papilio.trainer.train", "--recipe", "r", "--train.epochs=2"]
    assert "--nproc-per-node=4" in app.roles[0].args
    with pytest.raises(SystemExit):
        specs.builders.materialize_appdef(component.fn, ["--help"])
    assert "path of a .toml file, or the bare name" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("app", "expected"),
    [
        (
            components.preprocess("--split", "random", source="criteo", input=["a.gz", "b.gz"], output="d", cpu=3),
            {"source": "criteo", "inputs": ["a.gz", "b.gz"], "output": "d", "num_workers": 3, "split": "random"},
        ),
        (
            components.export("runs/a", "p", "auto", size_budget=0.2, table=["t_a=fp16", "t_b=int4"], gate=False),
            {"run": "runs/a", "quantize": "auto", "table": ["t_a=fp16", "t_b=int4"], "no_gate": True},
        ),
        (
            components.predict("p", "s.parquet", input=["a.tsv", "b.tsv"], source="criteo", cpu=3),
            {"package": "p", "output": "s.parquet", "inputs": ["a.tsv", "b.tsv"], "source": "criteo", "threads": 3},
        ),
        (
            components.study(
                "--seed=3", recipe="r", output="s", ranks=["1", "4"], hosts_predicted=["2"], host="dgx_h100"
            ),
            {"recipe": "r", "ranks": [1, 4], "predict_hosts": [2], "hardware": "dgx_h100", "overrides": ["--seed=3"]},
        ),
        (components.study(recipe="r", output="s", host="dgx_h100"), {"ranks": [1, 2, 4, 8], "steps": 200}),
    ],
)
def test_a_verb_understands_what_its_component_says(app: specs.AppDef, expected: dict[str, object]) -> None:
    role = resolve(app)
    name, *words = role.args[role.args.index("papilio.launch.cli") + 1 :]
    verb = next((verb for verb in VERBS if verb.name == name), None)
    if verb is None:
        pytest.skip(f"there is no verb {name} yet")
    parsed = vars(parse_arguments(verb, words))
    assert {key: parsed[key] for key in expected} == expected
    assert role.num_replicas == 1


def test_a_study_asks_for_the_ranks_it_measures() -> None:
    resource = components.study(recipe="r", output="s", ranks=["1", "4"], host="dgx_h100").roles[0].resource
    assert (resource.gpu, resource.cpu) == (4, 112)


def test_submitting_needs_no_torch() -> None:
    code = "import papilio.launch.components, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60, check=True)
