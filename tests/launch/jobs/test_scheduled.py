"""`papilio launch` and its companions on this machine; on Slurm, tests/end_to_end/test_slurm*.py."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torchx import specs
from torchx.runner import Runner
from torchx.schedulers import get_scheduler_factories
from torchx.specs import AppState

from papilio.launch import cli
from papilio.launch.jobs import scheduled as scheduled_jobs
from papilio.launch.jobs.first_error import find_first_error
from papilio.launch.schedulers.errors import SchedulerError
from papilio.launch.schedulers.job_folder import JobRecord, find_record, make_folder, new_folder, read_events
from papilio.launch.schedulers.local.supervisor import PID
from papilio.launch.schedulers.runner import make_runner
from papilio.launch.schedulers.slurm.scripts import quote, render, resolve_role

REPOSITORY = Path(__file__).resolve().parents[3]
Papilio = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def papilio(capsys: pytest.CaptureFixture[str]) -> Papilio:
    """The command with these words: status, output, errors."""

    def call(*words: str) -> tuple[int, str, str]:
        try:
            status = cli.main(words)
        except SystemExit as exit:
            status = int(str(exit.code))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def runner() -> Iterator[Runner]:
    with make_runner() as runner:
        yield runner


def make_app(script: str, num_hosts: int = 1, **settings: object) -> specs.AppDef:
    role = specs.Role("small", "", entrypoint="bash", args=["-c", script], num_replicas=num_hosts)
    return specs.AppDef("small", roles=[dataclasses.replace(role, **settings)])


def start(runner: Runner, app: specs.AppDef) -> tuple[str, JobRecord]:
    app.roles[0].resource = specs.Resource(cpu=1, gpu=0, memMB=10)
    handle = runner.run(app, "local_cwd")
    record = find_record("local_cwd", handle.rpartition("/")[2])
    assert record is not None
    return handle, record


def test_a_job_goes_on_without_the_process_that_started_it(runner: Runner, papilio: Papilio) -> None:
    app = make_app("echo $$WHAT on ${replica_id}; sleep 0.3; echo done", 2, env={"WHAT": "1,2 $$x"})
    handle, record = start(runner, app)
    assert re.fullmatch(r"local_cwd://papilio/small-\d{8}-\d{6}-[0-9a-f]{6}", handle)
    status, out, err = papilio("logs", "-f", handle)
    assert status == 0
    assert {line for line in out.splitlines() if "attempt" not in line} == {
        "1,2 $x on 0",
        "done",
        "host 1: 1,2 $x on 1",
        "host 1: done",
    }
    assert f"{handle}  small  SUCCEEDED  (status 0)" in err
    assert papilio("logs", handle, "--host", "1")[1].splitlines()[1:] == ["host 1: 1,2 $x on 1", "host 1: done"]
    assert Path(record.folder).parent == Path.cwd() / "jobs"


def test_a_cancelled_job_ends_in_its_own_way(runner: Runner, papilio: Papilio) -> None:
    handle, record = start(runner, make_app("trap 'exit 75' TERM; echo ready; while true; do sleep 0.05; done"))
    wait_until(lambda: "ready" in Path(record.folder, "host_0.log").read_text())
    assert json.loads(papilio("status", "--json")[1])["state"] == "RUNNING"
    status, out, err = papilio("cancel")
    assert (status, out) == (2, "")
    assert f"it is {handle} (small, started " in err and f"add --yes, or say papilio cancel {handle}" in err
    assert papilio("cancel", "--yes")[1].startswith(f"{handle} was told to end; its ranks save first")
    assert runner.wait(handle, wait_interval=0.05).state == AppState.CANCELLED
    told = json.loads(papilio("status", handle, "--json")[1])
    assert (told["state"], told["message"]) == ("CANCELLED", "cancelled, the ranks saved before")
    assert told["exit_status"] == 75
    assert papilio("cancel", handle)[1] == f"{handle} has ended already: CANCELLED\n"


def test_a_job_is_tried_again(runner: Runner, papilio: Papilio, tmp_path: Path) -> None:
    handle, record = start(
        runner, make_app(f"echo x >> {tmp_path}/tries; [ $$(wc -l < {tmp_path}/tries) = 2 ] || exit 6", max_retries=1)
    )
    status = runner.wait(handle, wait_interval=0.05)
    assert (status.state, status.num_restarts) == (AppState.SUCCEEDED, 1)
    assert [event.what for event in read_events(record.folder)] == ["begins", "ended", "retried", "begins", "ended"]
    assert "SUCCEEDED, attempt 2" in papilio("status", record.app_id)[1]


def test_what_would_go_wrong_again_is_not_tried_again(runner: Runner, papilio: Papilio) -> None:
    """One host knows (78); the other was only killed after it (137)."""
    handle, record = start(runner, make_app("[ ${replica_id} = 1 ] && exit 78; exit 137", 2, max_retries=5))
    assert papilio("logs", "-f", handle)[0] == 78
    assert [event.what for event in read_events(record.folder)] == ["begins", "ended"]
    told = papilio("status", handle)[1].splitlines()[0]
    assert told == f"{handle}  small  FAILED  (status 78: it would go wrong again, and is not tried again)"


def test_a_failed_job_shows_the_first_error(runner: Runner, papilio: Papilio) -> None:
    failure = "rank 3 (host n2) failed first: ValueError: no such table"
    handle, _ = start(runner, make_app(f"echo 'papilio train: error: {failure}'; exit 5", 2))
    status, _, err = papilio("logs", "-f", handle)
    assert status == 5
    assert f"first error: {failure}" in err


def test_a_killed_supervisor_is_noticed(runner: Runner) -> None:
    handle, record = start(runner, make_app("sleep 2"))
    os.kill(int(Path(record.folder, PID).read_text().split()[0]), signal.SIGKILL)
    wait_until(lambda: runner.status(handle).state == AppState.FAILED)
    assert runner.status(handle).msg.startswith("its supervisor was killed, or this machine was started anew")


def test_list_has_all_jobs_and_the_newest_last(runner: Runner, papilio: Papilio) -> None:
    assert papilio("list", "-s", "local_cwd") == (0, "no jobs (on local_cwd)\n", "")
    handles = [start(runner, make_app(script))[0] for script in ("true", "exit 1")]
    for handle in handles:
        runner.wait(handle, wait_interval=0.05)
    _, out, _ = papilio("list", "-s", "local_cwd")
    lines = out.splitlines()
    assert lines[0].split() == ["job", "name", "state", "hosts", "started", "folder"]
    assert [line.split()[:4] for line in lines[1:]] == [
        [handles[0], "small", "SUCCEEDED", "1"],
        [handles[1], "small", "FAILED", "1"],
    ]


def test_mounts_and_more_roles_are_refused(runner: Runner) -> None:
    with pytest.raises(SchedulerError, match=r"local_cwd starts no containers, so the job's 1 mount\(s\)"):
        start(runner, make_app("true", mounts=[specs.BindMount("/a", "/b")]))
    app = make_app("true")
    app.roles.append(app.roles[0])
    with pytest.raises(SchedulerError, match="on local_cwd a job has one role; small has 2"):
        start(runner, app)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch", "trian", "--recipe", "r"], "there is no component trian; there are "),
        (["launch", "-s", "lsf", "train"], "invalid choice: 'lsf'"),
        (["launch", "train", "--recipe", "quickstart", "--train.epoch=2"], "did you mean train.epochs?"),
        (
            ["launch", "-cfg", "partition=a", "train", "--recipe", "quickstart"],
            "the settings of local_cwd are jobs_dir",
        ),
        (["launch", "-cfg", "jobs_dir", "train", "--recipe", "quickstart"], "-cfg jobs_dir: the settings of local_cwd"),
        (["status"], "no job was started from this machine; give a job, as in slurm://papilio/12"),
        (["status", "nobody"], "there is no job nobody; `papilio list` lists them"),
        (["status", "lsf://papilio/1"], "Papilio has no scheduler lsf; it has slurm, local_cwd, kubernetes"),
        (["status", "local_cwd://papilio/x"], "local_cwd knows no job local_cwd://papilio/x"),
        (["status", "papilio/x"], "there is no job papilio/x; `papilio list` lists them"),
        (["status", "slurm://x"], "slurm://x is no job; a handle is as slurm://papilio/12"),
        (["cancel", "slurm://papilio/--help"], "slurm://papilio/--help: a job on Slurm has a number"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(papilio: Papilio, words: list[str], message: str) -> None:
    status, out, err = papilio(*words)
    assert status in (1, 2, 3, 78) and out == ""
    assert message in err and err.count("\n") == 1


def test_cancel_refuses_a_job_that_is_not_there(papilio: Papilio) -> None:
    status, _, err = papilio("cancel", "local_cwd://papilio/x")
    assert (status, err.count("\n")) == (1, 1)
    assert "local_cwd knows no job local_cwd://papilio/x" in err


def test_cancel_without_a_job_leaves_another_folders_alone(
    runner: Runner, papilio: Papilio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    script = "trap 'exit 75' TERM; echo ready; while true; do sleep 0.05; done"
    mine, record = start(runner, make_app(script))
    wait_until(lambda: "ready" in Path(record.folder, "host_0.log").read_text())
    monkeypatch.chdir(tmp_path / "other")
    for words in (("--yes",), ("small", "--yes")):
        status, _, err = papilio("cancel", *words)
        assert status == 2
        assert "started from this folder; papilio cancel local_cwd://papilio/small-" in err
    others, other = start(runner, make_app(script))
    wait_until(lambda: "ready" in Path(other.folder, "host_0.log").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin.readline", lambda: "\n", raising=False)
    status, out, _ = papilio("cancel")
    assert status == 0 and out.startswith(f"cancel {mine} (small, started ") and out.endswith(f"{mine} goes on\n")
    monkeypatch.setattr("sys.stdin.readline", lambda: "y\n", raising=False)
    assert f"{mine} was told to end" in papilio("cancel")[1]
    assert runner.wait(mine, wait_interval=0.05).state == AppState.CANCELLED
    assert runner.status(others).state == AppState.RUNNING
    papilio("cancel", others)
    runner.wait(others, wait_interval=0.05)


def test_status_leaves_with_the_jobs_state(runner: Runner, papilio: Papilio, tmp_path: Path) -> None:
    good, bad = (start(runner, make_app(script))[0] for script in ("true", "exit 9"))
    for handle, code in ((good, 0), (bad, 1)):
        runner.wait(handle, wait_interval=0.05)
        assert papilio("status", handle)[0] == papilio("status", handle, "--json")[0] == code
    assert papilio("status", "local_cwd://papilio/x")[0] == 3
    assert papilio("status", "nobody")[0] == 2


def index_of(tmp_path: Path) -> Path:
    return tmp_path / "state" / "papilio" / "jobs"


def test_list_goes_on_past_what_it_cannot_read(runner: Runner, papilio: Papilio, tmp_path: Path) -> None:
    handle, record = start(runner, make_app("true"))
    runner.wait(handle, wait_interval=0.05)
    text = (index_of(tmp_path) / f"{record.app_id}.json").read_text()
    damaged = {
        "cut": text[:40],
        "list": "[]",
        "hosts": text.replace('"num_hosts": 1', '"num_hosts": "x"'),
        "utf": "\xff",
    }
    for name, content in damaged.items():
        (index_of(tmp_path) / f"{name}.json").write_text(content, encoding="latin-1")
    (index_of(tmp_path) / "gone.json").write_text(text.replace(record.folder, f"{record.folder}-gone"))
    (index_of(tmp_path) / "later.json").write_text(
        text.replace('"max_retries"', '"of_a_later_release": 1, "max_retries"')
    )
    Path(record.folder, "job.events").write_text("half a li\n1.0\t1\tended\t0\n1.5\tx")
    status, out, err = papilio("list", "-s", "local_cwd", "--json")
    rows = json.loads(out)
    assert status == 0
    assert [(row["job"], row["state"]) for row in rows] == [(handle, "SUCCEEDED")] * 2  # one by each release
    assert sorted(re.findall(r"/(\w+)\.json is no record of a job", err)) == sorted(damaged)
    shutil.rmtree(record.folder)
    Path(record.folder).write_text("a file now")
    assert papilio("list", "-s", "local_cwd")[1] == "no jobs (on local_cwd)\n"


def test_an_unreadable_folder_is_told_as_such(
    runner: Runner, papilio: Papilio, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, record = start(runner, make_app("true"))
    runner.wait(handle, wait_interval=0.05)

    def refuse(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("papilio.launch.schedulers.job_folder.os.listdir", refuse)  # root may read everything
    status, out, _ = papilio("status", handle)
    assert (status, out.splitlines()[0]) == (
        3,
        f"{handle}  small  UNKNOWN  (its folder {record.folder} cannot be read: Permission denied)",
    )


def test_a_job_of_another_machine_is_not_taken_for_dead(
    runner: Runner, papilio: Papilio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, record = start(runner, make_app("true"))
    runner.wait(handle, wait_interval=0.05)
    Path(record.folder, "job.events").write_text("1.0\t1\tbegins\tlocalhost\n")
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    status, out, _ = papilio("status", handle)
    assert (
        status == 3 and f"UNKNOWN  (it was started on {record.submitted_on}, and this is elsewhere: ask there)" in out
    )
    status, _, err = papilio("cancel", handle)
    assert status == 1 and "was not cancelled: it was started on" in err


def test_nothing_starts_where_its_folder_cannot_be(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app("true", resource=specs.Resource(cpu=1, gpu=0, memMB=10))
    (tmp_path / "file").touch()
    for jobs_dir, message in (
        (
            "file",
            r"file/small-.* cannot be made or written \(Not a directory\), and nothing was started; .* -cfg jobs_dir=",
        ),
        ("a\nb", r"the jobs folder '.*a\\nb' has the character '\\n': choose another with -cfg jobs_dir=FOLDER"),
        ("", r"the jobs folder .* is not named: choose another"),
    ):
        with pytest.raises(SchedulerError, match=message):
            runner.run(app, "local_cwd", cfg={"jobs_dir": jobs_dir})
    app.name = "../x ü%" + "y" * 300
    handle = runner.run(app, "local_cwd")
    assert re.fullmatch(r"local_cwd://papilio/\.\.-x-y{95}-\d{8}-\d{6}-[0-9a-f]{6}", handle)
    runner.wait(handle, wait_interval=0.05)
    (tmp_path / "full").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "full"))
    with pytest.raises(SchedulerError, match=r"full/papilio/jobs cannot be made or written .* XDG_STATE_HOME=FOLDER"):
        runner.run(app, "local_cwd")


def test_without_slurm_its_absence_is_told(papilio: Papilio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    status, _, err = papilio("status", "slurm://papilio/1")
    assert status == 3
    assert "there is no squeue on this machine; run this on a login node of the cluster" in err


def test_launch_shows_what_it_would_submit_and_puts_settings_where_torchx_wants_them(
    papilio: Papilio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent) + ":/usr/bin:/bin")
    words = ["--recipe", "quickstart", "--train.epochs=2", "--nnodes", "2", "--nproc", "3"]
    status, out, err = papilio("launch", "-s", "slurm", "-cfg", "partition=gpu,time=60", "--dryrun", "train", *words)
    assert status == 0, err
    for line in ("#SBATCH --partition=gpu", "#SBATCH --nodes=2", "#SBATCH --time=60", "#SBATCH --signal=TERM@55"):
        assert f"{line}\n" in out
    assert "--recipe quickstart --train.epochs=2\n" in out
    assert re.search(r"--rdzv-port=(\d+)", out)
    assert not Path("jobs").exists()


def test_a_component_explains_itself(papilio: Papilio) -> None:
    status, out, _ = papilio("launch", "train", "--help")
    assert status == 0
    assert "--nnodes" in out and "--recipe" in out


def test_torchxs_own_schedulers_and_default_are_untouched() -> None:
    """What `torchx run` offers when Papilio is installed; tests/launch/test_packaging.py looks at the entry points."""
    import papilio.launch.schedulers.runner  # noqa: F401

    names = list(get_scheduler_factories())
    assert names[0] == "local_docker"
    assert {"local_cwd", "slurm", "kubernetes"} <= set(names)


def test_a_script_survives_what_words_may_contain() -> None:
    role = specs.Role("r", "", entrypoint="bash", args=["-c", "x ${app_id} $$y"], num_replicas=4)
    scripts = render(resolve_role(role), title="a\nb", folder="/with space", sbatch_options=["-N2"])
    assert "# a b\n" in scripts.job
    assert "folder='/with space'\n" in scripts.job
    assert """exec bash -c 'x '"$SLURM_JOB_ID"' $y'\n""" in scripts.host


def test_words_are_quoted_but_for_what_only_the_job_knows() -> None:
    assert quote("a'b") == """'a'"'"'b'"""
    assert quote("--id=${app_id}/${replica_id}") == '--id="$SLURM_JOB_ID"/"$SLURM_NODEID"'
    assert quote("") == "''"


def test_the_first_error_is_that_of_the_last_attempt(tmp_path: Path) -> None:
    (tmp_path / "host_0.log").write_text(
        "papilio: attempt 1 on host 0\n[0]:papilio: error: rank 9 (host a) failed first: old\n"
        "papilio: attempt 2 on host 0\n[0]:fine\npapilio: error: the hosts do not find each other: Broken pipe\n"
    )
    (tmp_path / "host_1.log").write_text("papilio: attempt 2 on host 1\npapilio: error: the agent was killed\n")
    (tmp_path / "host_0.events").write_text("20.0\t2\tended\t1\n")
    (tmp_path / "host_1.events").write_text("19.0\t2\tended\t137\n")
    logs = {host: tmp_path / f"host_{host}.log" for host in (0, 1)}
    assert find_first_error(str(tmp_path), logs) == "host 1: the agent was killed"
    with logs[0].open("a") as log:
        log.write("[1]:[rank1]: papilio train: error: rank 1 (host b) failed first: OSError: no space\n")
    assert find_first_error(str(tmp_path), logs) == "rank 1 (host b) failed first: OSError: no space"
    logs[0].write_text("Segmentation fault\n")
    assert find_first_error(None, {0: logs[0]}) == "host 0, last line: Segmentation fault"


def test_a_scripts_own_complaint_is_not_the_first_error(tmp_path: Path) -> None:
    log = tmp_path / "host_0.log"
    log.write_text("papilio: attempt 1 on host 0\nBus error\nhost.sh: line 30: [: : integer expression expected\n")
    assert find_first_error(str(tmp_path), {0: log}) == "host 0, last line: Bus error"
    (tmp_path / "job.log").write_text(
        "papilio: attempt 1 on n1 n2\nsrun: error: n2: task 1: old\npapilio: attempt 2 on n1 n2\n"
        "slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED ***\n"
        "slurmstepd: error: Could not open stdout file /jobs/a/host_1.log: No such file or directory\n"
    )
    reason = "Could not open stdout file /jobs/a/host_1.log: No such file or directory"
    assert find_first_error(str(tmp_path), {0: log}) == f"Slurm says: {reason} ({tmp_path}/job.log)"
    assert find_first_error(str(tmp_path), {1: tmp_path / "host_1.log"}).startswith("host 1: ")


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_a_job_that_cannot_be_noted_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where HOME cannot be written; not even its folder is made."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file/state"))
    expected = (
        f"{tmp_path}/file/state/papilio/jobs cannot be made or written (Not a directory), and nothing was started"
    )
    with pytest.raises(
        SchedulerError, match=rf"{re.escape(expected)}; choose another place with XDG_STATE_HOME=FOLDER"
    ):
        make_folder(new_folder(str(tmp_path / "jobs"), "train"))
    assert not (tmp_path / "jobs").exists()


def test_a_narrow_terminal_leaves_out_the_last_columns_of_the_list(monkeypatch) -> None:
    cells = [["job", "name", "state", "hosts"], ["slurm://papilio/1", "train", "RUNNING", "4"]]
    monkeypatch.setattr(scheduled_jobs, "num_columns", lambda: 33)
    assert scheduled_jobs._fitting(cells) == ["job                name   state", "slurm://papilio/1  train  RUNNING"]
    monkeypatch.setattr(scheduled_jobs, "num_columns", lambda: None)
    assert scheduled_jobs._fitting(cells)[1] == "slurm://papilio/1  train  RUNNING  4"
