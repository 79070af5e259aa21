"""What is made of the words of Slurm's programs, and of a job's scripts where Slurm is only played."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from torchx import specs
from torchx.schedulers.slurm_scheduler import SlurmOpts
from torchx.specs import AppState

from papilio.launch import cli
from papilio.launch.schedulers import job_folder
from papilio.launch.schedulers.errors import SchedulerError
from papilio.launch.schedulers.job_folder import JobRecord, make_folder, write_record
from papilio.launch.schedulers.runner import make_runner
from papilio.launch.schedulers.slurm import queries
from papilio.launch.schedulers.slurm.sbatch_options import SlurmSettings, limit_s, pattern_of, sbatch_options
from papilio.launch.schedulers.slurm.scheduler import SlurmJobs
from papilio.launch.schedulers.slurm.scripts import render, resolve_role
from papilio.launch.schedulers.slurm.torchx_slurm import TorchxSlurm

Papilio = Callable[..., tuple[int, str, str]]
NO_CONTROLLER = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"
ACCEPTED_S = 1_796_000_000


class Slurm:
    """Plays Slurm's programs: what each prints, by its name; those that say nothing fail."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.cluster = "here"
        self.squeue: list[tuple[str, ...]] | None = []
        self.sacct: list[tuple[str, ...]] = []

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        self.asked.append(command)
        text, errors = getattr(self, f"_{command[0]}")(command)
        return subprocess.CompletedProcess(command, int(text is None), text or "", errors)

    def _squeue(self, command: list[str]) -> tuple[str | None, str]:
        if self.squeue is None:
            return None, NO_CONTROLLER
        rows = [row for row in self.squeue if "-j" not in command or row[0] == command[-1]]
        if not rows and "-j" in command:
            return None, "slurm_load_jobs error: Invalid job id specified\n"
        return "".join("\x1f".join(row) + "\n" for row in rows), ""

    def _sacct(self, command: list[str]) -> tuple[str | None, str]:
        rows = [row for row in self.sacct if "-j" not in command or row[0] == command[-1]]
        return "".join("\x1f".join(row) + "\n" for row in rows), ""

    def _scontrol(self, command: list[str]) -> tuple[str | None, str]:
        return (f"ClusterName             = {self.cluster}\n" if "config" in command else ""), ""

    def _scancel(self, command: list[str]) -> tuple[str | None, str]:
        return "", ""

    def _sinfo(self, command: list[str]) -> tuple[str | None, str]:
        return "main*|6000\n", ""

    @property
    def cancelled(self) -> list[str]:
        return [command[1] for command in self.asked if command[0] == "scancel"]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    slurm = Slurm()
    monkeypatch.setattr(queries, "_run", slurm.run)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    queries.cluster_name.cache_clear()
    return slurm


@pytest.fixture
def papilio(capsys: pytest.CaptureFixture[str]) -> Papilio:
    def call(*words: str) -> tuple[int, str, str]:
        status = cli.main(words)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def submitted(tmp_path: Path, app_id: str = "16", cluster: str = "here", name: str = "train") -> JobRecord:
    """A job as `papilio launch` leaves it."""
    folder = tmp_path / "jobs" / f"{name}-{cluster}-{app_id}"
    make_folder(folder)
    settings = {"submitted_s": ACCEPTED_S + int(app_id), "submitted_on": "n0", "submitted_from": str(tmp_path)}
    record = JobRecord("slurm", app_id, name, "train", 2, (), str(folder), cluster=cluster, **settings)
    write_record(record)
    return record


def row(record: JobRecord, state: str, reason: str = "None") -> tuple[str, ...]:
    times = (str(ACCEPTED_S), str(ACCEPTED_S))
    return (record.app_id, record.name, state, "", reason, *times, f"{record.folder}/job.sh")


def first_line(out: str) -> str:
    return re.sub(r"^slurm://papilio/\d+  \w+  ", "", out.splitlines()[0])


def test_another_clusters_job_of_the_same_number_is_neither_told_nor_cancelled(
    slurm: Slurm, papilio: Papilio, tmp_path: Path
) -> None:
    submitted(tmp_path, cluster="there")
    other = ("16", "train", "RUNNING", "", "None", str(ACCEPTED_S + 9), str(ACCEPTED_S + 9), "/home/me/other/job.sh")
    for squeue, sacct in (([other], []), ([], [other[:-1]])):
        slurm.squeue, slurm.sacct = squeue, sacct
        status, out, _ = papilio("status", "16")
        assert (status, first_line(out)) == (
            3,
            "UNKNOWN  (Slurm's job 16 is another one here, 'train'; its folder does not say how it ended)",
        )
        status, _, err = papilio("cancel", "16")
        assert (status, slurm.cancelled) == (1, [])
        assert "was not cancelled: it belongs to the cluster there, and this machine's is here" in err
    # Of two jobs of one number this cluster's is meant.
    mine = submitted(tmp_path, cluster="here")
    submitted(tmp_path, cluster="elsewhere")
    slurm.squeue = [row(mine, "RUNNING")]
    assert papilio("cancel", "16")[0] == 0
    assert slurm.cancelled == ["16"]


def test_a_number_that_was_not_launched_from_here_is_not_cancelled_unasked(slurm: Slurm, papilio: Papilio) -> None:
    slurm.squeue = [("16", "other", "RUNNING", "", "None", "1", "1", "/x.sh")]
    for word in ("16", "slurm://papilio/16"):
        status, _, err = papilio("cancel", word)
        assert (status, slurm.cancelled) == (2, [])
        assert f"papilio cancel {word} may end another job than you want" in err and "was not launched from here" in err
    assert papilio("cancel", "16", "--yes")[0] == 0
    assert slurm.cancelled == ["16"]


def test_a_recorded_job_counts_by_its_script_also_after_a_requeue(
    slurm: Slurm, papilio: Papilio, tmp_path: Path
) -> None:
    record = submitted(tmp_path)
    slurm.squeue = [(*row(record, "PENDING", "BeginTime")[:6], str(ACCEPTED_S + 5000), f"{record.folder}/job.sh")]
    status, out, _ = papilio("status", "16")
    assert (status, "PENDING: BeginTime, Slurm holds back a job that was requeued" in out) == (0, True)


def test_a_controller_that_does_not_answer_is_told_as_such(slurm: Slurm, papilio: Papilio, tmp_path: Path) -> None:
    record = submitted(tmp_path)
    slurm.squeue = None
    reason = f"Slurm's controller (slurmctld) does not answer: {NO_CONTROLLER.strip()}"
    status, out, _ = papilio("status", "16")
    assert (status, first_line(out)) == (3, f"UNKNOWN  ({reason}; its folder does not say how it ended)")
    assert papilio("status", "slurm://papilio/17") == (3, "", f"papilio status: error: {reason}\n")
    status, out, err = papilio("list", "-s", "slurm", "--json")
    assert (status, [job["state"] for job in json.loads(out)]) == (0, ["UNKNOWN"])
    assert err == f"papilio: {reason}; states are those that the jobs' folders know\n"
    # What has ended has ended, whoever remembers it.
    slurm.sacct = [row(record, "FAILED")[:-1]]
    assert first_line(papilio("status", "16")[1]).startswith("FAILED")
    Path(record.folder, "job.events").write_text("1.0\t1\tbegins\tn1\n2.0\t1\tended\t0\n")
    slurm.sacct = []
    assert papilio("status", "16")[0] == 0


def test_a_cancelled_job_stays_cancelled_when_slurm_has_forgotten_it(
    slurm: Slurm, papilio: Papilio, tmp_path: Path
) -> None:
    """Cancelled by us before it began; by scancel while it ran, which the job noted; and by us too late."""
    waiting, running, late = (submitted(tmp_path, number) for number in ("1", "2", "3"))
    slurm.squeue = [row(waiting, "PENDING"), row(running, "RUNNING"), row(late, "RUNNING")]
    assert papilio("cancel", "1")[0] == papilio("cancel", "3")[0] == 0
    Path(running.folder, "job.events").write_text("1.0\t1\tbegins\tn1\n2.0\t1\tended\t75\n2.1\t1\tstate\tCANCELLED\n")
    Path(late.folder, "job.events").write_text("1.0\t1\tbegins\tn1\n2.0\t1\tended\t0\n")
    slurm.squeue = []
    told = [papilio("status", number)[:2] for number in ("1", "2", "3")]
    assert [(status, first_line(out)) for status, out in told] == [
        (4, "CANCELLED  (Slurm has forgotten it; it was cancelled)"),
        (4, "CANCELLED  (Slurm has forgotten it; it was cancelled, the ranks saved before)"),
        (0, "SUCCEEDED  (Slurm has forgotten it; it ended with status 0)"),
    ]


def test_what_slurm_says_of_a_host_that_never_started_is_shown_while_the_others_wait(
    slurm: Slurm, papilio: Papilio, tmp_path: Path
) -> None:
    record = submitted(tmp_path)
    slurm.squeue = [row(record, "RUNNING")]
    log = Path(record.folder, "job.log")
    reason = "Could not open stdout file /j/host_1.log: No such file"
    log.write_text(f"papilio: attempt 1 on n1 n2\nslurmstepd: error: {reason}\n")
    assert f"  Slurm says: {reason} ({log})\n" in papilio("status", "16")[1]
    assert json.loads(papilio("status", "16", "--json")[1])["slurm_error"].startswith("Slurm says: Could not open")
    assert f"has printed anything yet; Slurm says: {reason} ({log})" in papilio("logs", "16")[2]
    log.unlink()
    slurm.squeue = [row(record, "FAILED", "NonZeroExitCode")]
    message = "FAILED, its first host wrote nothing into its folder: do all hosts see it? -cfg jobs_dir=FOLDER"
    assert message in papilio("status", "16")[1]


def test_list_asks_slurm_once_however_many_jobs_there_are(
    slurm: Slurm, papilio: Papilio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [submitted(tmp_path, str(number)) for number in range(1, 61)]
    slurm.squeue = [row(record, "RUNNING") for record in records[40:]]
    slurm.sacct = [row(record, "COMPLETED")[:-1] for record in records[20:]]
    slurm.squeue.append(("61", "odd\x1fname", "RUNNING", "", "", "1", "1", "/x"))
    index, reads = job_folder._index(), []
    monkeypatch.setattr(job_folder, "_index", lambda: reads.append(1) or index)
    rows = json.loads(papilio("list", "-s", "slurm", "--json")[1])
    assert len(slurm.asked) <= 3 and len(reads) <= 3
    states = ["UNKNOWN"] * 20 + ["SUCCEEDED"] * 20 + ["RUNNING"] * 20
    assert [(job["job"], job["state"], job["folder"]) for job in rows] == [
        (record.handle, state, record.folder) for record, state in zip(records, states, strict=True)
    ]


def make_role(script: str = "true", **settings: object) -> specs.Role:
    role = specs.Role("train", "", entrypoint="bash", args=["-c", script], num_replicas=1, **settings)
    return resolve_role(role)


def read_option(line: str) -> str:
    """As sbatch reads what follows #SBATCH: white space and # end it, quotes and backslashes keep them."""
    text, quote, escaped = "", "", False
    for letter in line:
        if escaped:
            text, escaped = text + letter, False
        elif letter == "\\":
            escaped = True
        elif quote:
            text, quote = (text, "") if letter == quote else (text + letter, quote)
        elif letter in "'\"":
            quote = letter
        elif letter.isspace() or letter == "#":
            break
        else:
            text += letter
    assert not quote
    return text


@pytest.mark.parametrize(
    "text", ["x --begin=now+1hour", "it's", 'say "so"', "a\\b", "a # b", "50%", "ü|;&$(ls)`ls`", "'\"\\ "]
)
def test_free_text_stays_one_option(slurm: Slurm, text: str) -> None:
    settings = SlurmSettings(partition=text, account=text, comment=text, qos=text, constraint=text, mail_user=text)
    folder = Path("/jobs", text.replace("\\", ""))
    lines = sbatch_options(text, make_role(), settings, folder)
    read = dict(read_option(line).removeprefix("--").partition("=")[::2] for line in lines)
    named = {read[key] for key in ("job-name", "partition", "account", "comment", "qos", "constraint", "mail-user")}
    assert named == {text}
    assert read["output"].replace("%%", "%") == f"{folder}/job.log" and "%" not in read["output"].replace("%%", "")
    assert "begin" not in read


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"comment": "a\n#SBATCH --begin=now+1hour"}, r"-cfg comment 'a\\n#SBATCH --begin=now\+1hour': the character"),
        ({"partition": ""}, "-cfg partition '': it is empty; give a value, or leave it out"),
        ({"account": "a" * 2000}, "-cfg account 'a+'...: it has 2000 letters, 1000 are allowed; shorten it"),
        ({"time": "1"}, r"-cfg time=1 is 60 s, of which 60 s are for saving .* give at least 2 \(minutes\)"),
        ({"time": "1h"}, "-cfg time='1h': a time is minutes, minutes:seconds, .* as in 60 or 1-12:00:00"),
        ({"time": "60 --begin=now+1hour"}, "-cfg time='60 --begin"),
    ],
)
def test_settings_that_are_none_are_refused(slurm: Slurm, settings: dict[str, str], message: str) -> None:
    with pytest.raises(SchedulerError, match=message):
        sbatch_options("train", make_role(), SlurmSettings(**settings), Path("/jobs"))


def test_a_name_with_a_line_end_is_refused_before_anything_is_made(slurm: Slurm, tmp_path: Path) -> None:
    app = specs.AppDef("x\n#SBATCH --begin=now+1hour", roles=[make_role()])
    with pytest.raises(SchedulerError, match=r"--name 'x\\n#SBATCH --begin=now\+1hour': the character '\\n'"):
        SlurmJobs("papilio")._submit_dryrun(app, SlurmSettings())
    assert not (tmp_path / "jobs").exists()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("x --begin=now+1hour", {}, "--name 'x --begin=now\\+1hour': only letters of English"),
        ("x", {"comment": "a\nb"}, r"-cfg comment 'a\\nb': only letters .* or use papilio launch -s slurm"),
        ("x", {"partition": "a b"}, "-cfg partition 'a b': only letters"),
    ],
)
def test_torchxs_own_submission_takes_words_only(name: str, settings: dict[str, str], message: str) -> None:
    app = specs.AppDef(name, roles=[make_role(resource=specs.Resource(cpu=1, gpu=0, memMB=10))])
    with pytest.raises(SchedulerError, match=message):
        TorchxSlurm("torchx")._submit_dryrun(app, SlurmOpts(**settings))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("60", 3600),
        ("1:30", 90),
        ("2:00:05", 7205),
        ("1-2", 93_600),
        ("1-12:00:00", 129_600),
        ("0", None),
        (None, None),
    ],
)
def test_a_time_is_read_as_slurm_reads_it(text: str, seconds: int | None) -> None:
    assert limit_s(SlurmSettings(time=text)) == seconds


class Host:
    """Runs a job's scripts with programs that play Slurm: srun runs host.sh of one host."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.programs = folder, folder.parent / "programs"
        folder.mkdir()
        self.programs.mkdir()
        self.play(
            "scontrol", 'case "$*" in *hostnames*) echo n1;; "show job"*) echo JobState=RUNNING;; *) echo "$@";; esac'
        )
        host = f"bash {shlex.quote(str(folder))}/host.sh"
        self.play("srun", f'[ "$1" = --overlap ] || SLURM_NODEID=0 SLURMD_NODENAME=n1 {host} "${{@: -2}}"')
        self.play("sleep", "exit 0")
        self.play("seq", "echo 1")

    def play(self, program: str, script: str) -> None:
        (self.programs / program).write_text(f"#!/bin/bash\n{script}\n")
        (self.programs / program).chmod(0o755)

    def run(self, role: specs.Role, **settings: bool) -> subprocess.CompletedProcess[str]:
        scripts = render(role, title="t", folder=str(self.folder), sbatch_options=[], **settings)
        (self.folder / "job.sh").write_text(scripts.job)
        (self.folder / "host.sh").write_text(scripts.host)
        environment = {**os.environ, "PATH": f"{self.programs}:{os.environ['PATH']}"}
        environment |= {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n1"}
        command = ["bash", str(self.folder / "job.sh")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    def events(self) -> list[tuple[str, str]]:
        lines = (self.folder / "job.events").read_text().splitlines()
        return [(what, details) for _, _, what, details in (line.split("\t") for line in lines)]


def test_the_jobs_variables_are_not_those_of_its_scripts(tmp_path: Path) -> None:
    """With the job's PATH host.sh found neither date nor grep, and said `[: : integer expression expected`."""
    host = Host(tmp_path / 'it\'s 50% "x"')
    done = host.run(make_role("echo $PATH $1 $IFS; exit 3", env={"PATH": "/nowhere:/bin", "IFS": "5", "attempt": "9"}))
    assert done.returncode == 3
    assert "/nowhere:/bin" in done.stdout
    assert done.stderr == ""
    assert host.events() == [("begins", "n1 "), ("ended", "3")]


def test_a_job_that_could_not_save_before_its_limit_is_requeued_once(tmp_path: Path) -> None:
    host = Host(tmp_path / "job")
    assert host.run(make_role("exit 143", max_retries=5), has_time_limit=True).returncode == 143
    expected = [("begins", "n1 "), ("ended", "143"), ("requeued", "nothing was saved before the time limit")]
    assert host.events() == expected
    assert host.run(make_role("exit 143", max_retries=5), has_time_limit=True).returncode == 143
    assert host.events() == [*expected, *expected[:2]]


def test_the_scripts_need_no_notes(tmp_path: Path) -> None:
    """On a full disk nothing is noted; what the job said last stays the last word."""
    host = Host(tmp_path / "job")
    (host.folder / "job.events").mkdir()
    (host.folder / "host_0.events").mkdir()
    done = host.run(make_role("exit 5", max_retries=0))
    assert "integer expression" not in done.stderr
    assert done.returncode == 5


def test_a_job_of_which_a_host_never_started_has_not_succeeded(tmp_path: Path) -> None:
    """srun leaves with 0, as Slurm 22.05 does when a host cannot open the log."""
    host = Host(tmp_path / "job")
    (host.folder / "job.log").write_text("papilio: attempt 1 on n1 n2\nsrun: error: task 1 launch failed: no IO\n")
    assert host.run(make_role("exit 0")).returncode == 1
    assert host.events()[1] == ("ended", "1")
    assert host.run(make_role("exit 0")).returncode == 0  # another attempt


def test_a_job_notes_how_slurm_ended_it(tmp_path: Path) -> None:
    host = Host(tmp_path / "job")
    host.play("scontrol", 'case "$*" in *hostnames*) echo n1;; *) echo "   JobState=CANCELLED Reason=None";; esac')
    assert host.run(make_role("exit 75")).returncode == 75
    assert host.events() == [("begins", "n1 "), ("ended", "75"), ("state", "CANCELLED")]


def test_a_percent_sign_is_no_pattern() -> None:
    assert pattern_of(Path("/a%j/b")) == "/a%%j/b"


def test_a_followed_job_outlives_a_controller_that_starts_anew(slurm: Slurm, tmp_path: Path) -> None:
    record = submitted(tmp_path)
    slurm.squeue = None
    with make_runner() as runner:
        status = runner.status(record.handle)
        assert status is not None and status.state == AppState.UNKNOWN and not status.is_terminal()
        slurm.squeue = [row(record, "RUNNING")]
        status = runner.status(record.handle)
        assert status is not None and status.state == AppState.RUNNING


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-s", "slurm", "-cfg", "partition="), "-cfg partition=: it is empty"),
        (("-s", "kubernetes", "-cfg", "queue="), "-cfg queue=: it is empty"),
        (("-s", "slurm", "-cfg", "partition=a,partition=b"), "-cfg partition is given twice"),
        (("-s", "slurm", "-cfg", "time=60", "-cfg", "time=70"), "-cfg time is given twice"),
        (("-s", "slurm", "-cfg", "comment=a=b"), "-cfg comment=a=b: `a` cannot be split"),
        (("-s", "slurm", "-cfg", "jobs_dir=s3://bucket/jobs"), "-cfg jobs_dir = s3://bucket/jobs: object storage is"),
        (("-s", "local_cwd", "-cfg", "jobs_dir=s3://bucket/jobs"), "-cfg jobs_dir = s3://bucket/jobs: object storage"),
        (("-s", "slurm", "-cfg", "time=99999999999"), "-cfg time=99999999999 is more than 10 years"),
        (("-s", "slurm", "-cfg", "time=1"), "-cfg time=1 is 60 s"),
    ],
)
def test_a_setting_that_cannot_be_followed_is_one_line(
    slurm: Slurm, papilio: Papilio, words: tuple[str, ...], message: str
) -> None:
    status, out, err = papilio("launch", *words, "--dryrun", "train", "--recipe", "quickstart")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize("scheduler", ["slurm", "local_cwd"])
def test_an_image_that_would_not_be_used_is_refused(slurm: Slurm, papilio: Papilio, scheduler: str) -> None:
    words = ("-s", scheduler, "--dryrun", "train", "--recipe", "quickstart")
    status, _, err = papilio("launch", *words, "--image", "r/x:1")
    assert (status, f"--image r/x:1: {scheduler} starts no containers; leave --image out" in err) == (2, True)
    status, _, err = papilio("launch", *words, "--python", "")
    assert (status, "--python '': it is empty" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "expected", "message"),
    [
        (("launch", "calibrate", "--output", "s3://b/k"), 2, "--output = s3://b/k: object storage is not supported"),
        (("launch", "evaluate", "--run", "s3://b/k"), 2, "--run = s3://b/k: object storage is not supported here"),
        (("launch", "train", "--recipe", "quickstart", "--train.epochs=-1"), 78, "train.epochs = -1: "),
        (("status", "kubernetes://papilio/x"), 2, "a job on Kubernetes is NAMESPACE:NAME"),
        (("cancel", "kubernetes://papilio/a:b:c"), 2, "a job on Kubernetes is NAMESPACE:NAME"),
        (("status", "."), 3, "papilio status: error: . is not a run folder"),
    ],
)
def test_a_job_that_cannot_be_meant_is_one_line(
    slurm: Slurm, papilio: Papilio, words: tuple[str, ...], expected: int, message: str
) -> None:
    words = ("launch", "--dryrun", *words[1:]) if words[0] == "launch" else words
    status, out, err = papilio(*words)
    assert (status, out, err.count("\n")) == (expected, "", 1)
    assert message in err
