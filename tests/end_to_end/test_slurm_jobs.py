"""Small jobs on a real Slurm: what a host gets, how a job ends, and what is told of it."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torchx import specs
from torchx.runner import Runner
from torchx.specs import AppState

from papilio.launch import cli
from papilio.launch.schedulers.errors import SchedulerError
from papilio.launch.schedulers.job_folder import JobRecord, find_record, read_events
from papilio.launch.schedulers.runner import make_runner
from papilio.launch.schedulers.slurm import queries as slurm_queries
from tests.support.slurm_cluster import SlurmCluster
from tests.support.torchx_command import run_torchx

TIMEOUT_S = 180


@pytest.fixture
def runner(slurm: SlurmCluster) -> Iterator[Runner]:
    with make_runner() as runner:
        yield runner


def make_app(script: str, num_hosts: int = 2, **settings: object) -> specs.AppDef:
    """A job whose hosts each run a line of bash; `$$` is TorchX's spelling of `$`."""
    resource = specs.Resource(cpu=1, gpu=0, memMB=100)
    role = specs.Role("small", "", entrypoint="bash", args=["-c", script], num_replicas=num_hosts, resource=resource)
    return specs.AppDef("small", roles=[dataclasses.replace(role, **settings)])


def run(runner: Runner, app: specs.AppDef, cfg: dict[str, str] | None = None) -> tuple[str, specs.AppStatus, JobRecord]:
    handle = runner.run(app, "slurm", cfg=cfg)
    status = runner.wait(handle, wait_interval=0.2)
    assert status is not None
    record = find_record("slurm", handle.rpartition("/")[2])
    assert record is not None
    return handle, status, record


def output(runner: Runner, handle: str, host: int) -> list[str]:
    lines = [line.rstrip("\n") for line in runner.log_lines(handle, "small", host)]
    return [line for line in lines if not line.startswith("papilio: attempt")]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def test_environment_and_macros_arrive_whole_on_every_host(runner: Runner) -> None:
    """TorchX's own scheduler cuts a value at its first comma."""
    awkward = {"COMMAS": "1,2,A=3", "QUOTES": """it's "so" $$HOME `ls`""", "LINES": "one\ntwo", "JOB": "j${app_id}j"}
    names = " ".join(f'"$${name}"' for name in awkward)
    app = make_app(f"printf '%s|' {names} $$SLURM_NODEID ${{replica_id}}", env=awkward)
    handle, status, _ = run(runner, app)
    assert status.state == AppState.SUCCEEDED
    job_id = handle.rpartition("/")[2]
    for host in (0, 1):
        text = "\n".join(output(runner, handle, host))
        assert text == f"""1,2,A=3|it's "so" $HOME `ls`|one\ntwo|j{job_id}j|{host}|{host}|"""


def test_a_job_of_one_host_needs_no_other_and_its_folder_and_texts_may_be_called_anything(
    runner: Runner, tmp_path: Path
) -> None:
    app = make_app("echo alone on $$SLURM_NNODES", num_hosts=1)
    app.name = 'it\'s "x" --begin=now+1hour | # 50%j'
    settings = {"jobs_dir": f"{tmp_path}/a b'c\"d%j#|ü", "comment": "a\\b 'c' \"d\" --hold"}
    handle, status, record = run(runner, app, settings)
    assert status.state == AppState.SUCCEEDED
    assert (record.cluster, Path(record.folder).parent) == ("test", Path(settings["jobs_dir"]))
    assert Path(record.folder, "job.log").exists()
    (row,) = slurm_queries.query_job(record.app_id)
    assert (row.name, row.submitted_s, row.command) == (app.name, record.accepted_s, f"{record.folder}/job.sh")
    assert (
        f"Comment={settings['comment']}"
        in subprocess.run(["scontrol", "show", "job", record.app_id], capture_output=True, text=True, check=True).stdout
    )
    assert output(runner, handle, 0) == ["alone on 1"]


def test_the_status_is_that_of_the_host_that_failed_first(
    runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """srun would say 9, the largest."""
    # Host 0 may start long before host 1 on a busy machine, and fails after it all the same.
    failing = f"[ $$SLURM_NODEID = 1 ] && touch {tmp_path}/fails && echo 'papilio: error: no disk' && exit 3"
    app = make_app(f"{failing}; while [ ! -e {tmp_path}/fails ]; do sleep 0.1; done; sleep 2; exit 9")
    handle, status, _ = run(runner, app)
    assert (status.state, status.msg) == (AppState.FAILED, "FAILED, status 3")
    assert cli.main(["status", handle, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["exit_status"], told["state"], told["first_error"]) == (3, "FAILED", "host 1: no disk")
    assert cli.main(["logs", "-f", handle]) == 3
    captured = capsys.readouterr()
    assert "host 1: papilio: error: no disk" in captured.out
    assert "first error: host 1: no disk" in captured.err


def test_a_job_is_tried_again_as_often_as_was_said(runner: Runner, tmp_path: Path) -> None:
    script = f"echo x >> {tmp_path}/$$SLURM_NODEID; [ $$(wc -l < {tmp_path}/$$SLURM_NODEID) = 2 ]"
    handle, status, record = run(runner, make_app(script, max_retries=1))
    assert (status.state, status.num_restarts) == (AppState.SUCCEEDED, 1)
    assert [event.what for event in read_events(record.folder)] == ["begins", "ended", "retried", "begins", "ended"]
    assert (tmp_path / "1").read_text() == "x\n" * 2
    begun = [line for line in runner.log_lines(handle, "small", 1) if line.startswith("papilio: attempt")]
    assert [line.split(",")[0] for line in begun] == [f"papilio: attempt {count} on host 1 of 2" for count in (1, 2)]


def test_what_would_go_wrong_again_is_not_tried_again(
    runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second attempt fails on host 0 first, but only host 1 knows why (status 78)."""
    later = "[ $$SLURM_NODEID = 0 ] && exit 1; sleep 0.5; exit 78"
    script = f"[ -e {tmp_path}/$$SLURM_NODEID ] || {{ touch {tmp_path}/$$SLURM_NODEID; exit 5; }}; {later}"
    handle, status, record = run(runner, make_app(script, max_retries=5))
    assert (status.state, status.num_restarts) == (AppState.FAILED, 1)
    assert status.msg == "FAILED, status 78: it would go wrong again, and is not tried again"
    assert [event.what for event in read_events(record.folder)] == ["begins", "ended", "retried", "begins", "ended"]
    assert cli.main(["logs", "-f", handle]) == 78
    assert "status 78: it would go wrong again" in capsys.readouterr().err


def test_a_cancelled_job_is_told_to_end_once(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    script = "trap 'echo told; exit 75' TERM; echo ready; while true; do sleep 0.1; done"
    handle = runner.run(make_app(script, max_retries=3), "slurm")
    for host in (0, 1):  # one that is not ready yet would end without saving
        for line in runner.log_lines(handle, "small", host, should_tail=True):
            if line == "ready\n":
                break
    assert cli.main(["cancel", handle]) == 0
    status = runner.wait(handle, wait_interval=0.2)
    assert status is not None and status.state == AppState.CANCELLED
    assert cli.main(["logs", "-f", handle]) == 75
    assert [line for line in output(runner, handle, 1) if line in ("ready", "told")] == ["ready", "told"]
    assert "small/1 told\n" in run_torchx("log", f"{handle}/small/1").stdout
    captured = capsys.readouterr()
    assert f"{handle} was told to end" in captured.out
    assert "CANCELLED, the ranks saved before" in captured.err
    assert cli.main(["cancel", handle]) == 0
    assert "has ended already: CANCELLED" in capsys.readouterr().out


COMPONENT = """
from torchx import specs

def waiting() -> specs.AppDef:
    script = "echo $$WHAT on $$SLURM_NODEID; exec sleep 600"
    role = specs.Role("small", "", entrypoint="bash", args=["-c", script], num_replicas=2, env={"WHAT": "1,2,A=3"})
    role.resource = specs.Resource(cpu=1, gpu=0, memMB=100)
    return specs.AppDef("job", roles=[role])
"""


def test_torchxs_own_commands_work_on_what_torchx_submits(slurm: SlurmCluster, tmp_path: Path) -> None:
    """On this Slurm, without a database, TorchX's own would end with KeyError 'job_resources'."""
    (tmp_path / "component.py").write_text(COMPONENT)

    def torchx(*words: str) -> str:
        done = run_torchx(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    handle = torchx("run", "--workspace", "", "-s", "slurm", "component.py:waiting").split()[0]
    job_id = handle.rpartition("/")[2]
    logs = [tmp_path / f"slurm-{job_id}-small-{host}.out" for host in (0, 1)]
    wait_until(lambda: all(log.exists() and log.read_text() for log in logs))
    told = json.loads(torchx("status", "--json", handle))
    (role,) = told["roles"]
    assert (told["state"], [each["hostname"] for each in role["replicas"]]) == ("RUNNING", slurm.hosts[:2])
    assert logs[1].read_text() == "1,2,A=3 on 1\n"
    assert re.search(rf"slurm://torchx/{job_id} +small +RUNNING", torchx("list", "-s", "slurm"))
    assert "'num_replicas': 2" in torchx("describe", handle)
    torchx("cancel", handle)
    wait_until(lambda: '"CANCELLED"' in torchx("status", "--json", handle))
    assert "small/1 1,2,A=3 on 1" in torchx("log", "--streams", "stdout", f"{handle}/small")


def test_what_slurm_has_forgotten_its_folder_knows(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an accounting database Slurm forgets a job after MinJobAge, 5 minutes."""
    good, bad = run(runner, make_app("true", 1))[0], run(runner, make_app("exit 4", 1))[0]
    monkeypatch.setattr(slurm_queries, "query_job", lambda job_id: [])
    monkeypatch.setattr(slurm_queries, "query_jobs", list)
    for handle, state, ending in ((good, "SUCCEEDED", "0"), (bad, "FAILED", "4")):
        assert cli.main(["status", handle]) == (0 if handle == good else 1)
        line = capsys.readouterr().out.splitlines()[0]
        assert line == f"{handle}  small  {state}  (Slurm has forgotten it; it ended with status {ending})"
    assert cli.main(["list", "-s", "slurm", "--json"]) == 0
    states = {row["job"]: row["state"] for row in json.loads(capsys.readouterr().out)}
    assert (states[good], states[bad]) == ("SUCCEEDED", "FAILED")
    with pytest.raises(SchedulerError, match="slurm job 99999 has no log of host 0 yet"):
        next(iter(runner._scheduler("slurm").log_iter("99999", "small")))
    assert cli.main(["status", "99999"]) == 3
    assert "slurm knows no job slurm://papilio/99999" in capsys.readouterr().err


def test_what_slurm_refuses_is_told_in_its_words(runner: Runner) -> None:
    with pytest.raises(SchedulerError, match=r"Slurm refused the job: .*partition.*; the script is .*/job\.sh"):
        runner.run(make_app("true"), "slurm", cfg={"partition": "nowhere"})


def test_why_a_job_waits_is_told(runner: Runner) -> None:
    handle = runner.run(make_app("true", num_hosts=4), "slurm")
    status = runner.status(handle)
    assert status is not None and status.state == AppState.PENDING
    assert status.msg.startswith("PENDING: PartitionConfig, it asks for more hosts or time than the partition has")
    runner.cancel(handle)
    status = runner.status(handle)
    assert status is not None and status.state == AppState.CANCELLED


def test_what_slurm_cannot_do_is_refused_by_name(runner: Runner) -> None:
    mounts = [specs.BindMount("/a", "/b")]
    with pytest.raises(SchedulerError, match=r"1 mount\(s\) \(BindMount.*src_path='/a'.*would be missing"):
        runner.run(make_app("true", mounts=mounts), "slurm")
    app = make_app("true")
    app.roles.append(dataclasses.replace(app.roles[0], name="reader"))
    with pytest.raises(SchedulerError, match=r"one role; small has 2 \(small, reader\): start each by itself"):
        runner.run(app, "slurm")
