"""The parts of a preflight by themselves: meeting, ranks that hang, nvidia-smi's lines, hashes, the table."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torchx import specs

from papilio.data_pipeline.verification import check_data
from papilio.launch import cli, components
from papilio.launch.preflight.facts import Gpu
from papilio.launch.preflight.finding import named, odd_ones_out
from papilio.launch.preflight.gpus import read_gpus
from papilio.launch.preflight.installed import code_hashes, folder_hash, installed_versions
from papilio.launch.preflight.links import LinkJob, measure_links
from papilio.launch.preflight.meeting import MeetingError, Place, open_meeting
from papilio.launch.preflight.reach import DataPort, resolve, send_parcel
from papilio.launch.preflight.wire import Line, free_port, listen
from papilio.launch.preflight.worker import read_options
from tests.support.datasets import write_dataset
from tests.support.preflight_hosts import MB, FakeHost, common_options, findings_of, run_hosts

REPOSITORY = Path(__file__).resolve().parents[3]


def place(index, port, num_hosts=2, wait_s=20.0, job="job"):
    return Place(num_hosts, "127.0.0.1", port, job, index, wait_s)


def start_head(port, found, num_hosts=2, wait_s=20.0):
    """Hold a meeting in a thread; what it finds goes into `found`."""

    def hold():
        with_guests = open_meeting(place(0, port, num_hosts, wait_s), {"name": "first"}, time.time)
        found["absent"] = dict(with_guests.absent)
        found["values"] = with_guests.gather("numbers", 0, 1.0)
        found["later"] = dict(with_guests.absent)
        with_guests.close()

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    return thread


def test_hosts_exchange_values_and_learn_numbers(monkeypatch) -> None:
    port, found = free_port(), {}
    head = start_head(port, found)
    # Here the first host's address is this host's own, too.
    monkeypatch.setattr("papilio.launch.preflight.meeting.is_own_address", lambda host: False)
    guest = open_meeting(place(None, port), {"name": "second"}, time.time)
    assert guest.index == 1
    assert [card["name"] for card in guest.roster] == ["first", "second"]
    assert guest.gather("numbers", 7, 5.0) == [0, 7]
    head.join(20)
    assert (found["values"], found["absent"]) == ([0, 7], {})
    assert abs(guest.clock_ahead_s) <= guest.clock_error_s + 0.05


def test_a_host_that_falls_silent_is_named() -> None:
    port, found = free_port(), {}
    head = start_head(port, found)
    guest = open_meeting(place(1, port), {"name": "second"}, time.time)
    guest.close()
    head.join(20)
    assert found["values"] == [0, None]
    assert found["later"] == {1: "fell silent while the hosts exchanged numbers: the other side closed the connection"}


def test_a_first_host_that_falls_silent_is_named() -> None:
    port = free_port()
    with listen(port) as server:

        def welcome_and_leave():
            line = Line(server.accept()[0])
            line.receive(10)
            line.send({"index": 1, "refusal": ""}, 10)
            while line.receive(10) == "time":
                line.send(time.time(), 10)
            line.close()

        threading.Thread(target=welcome_and_leave, daemon=True).start()
        with pytest.raises(MeetingError, match=rf"the first host \(127.0.0.1:{port}\) fell silent while the hosts ex"):
            open_meeting(place(1, port), {"name": "second"}, time.time)


def test_a_first_host_that_never_comes_is_named() -> None:
    port, notes = free_port(), []
    with pytest.raises(MeetingError, match=rf"^does not reach the first host at 127.0.0.1:{port}: connection refused$"):
        open_meeting(place(1, port, wait_s=0.3), {"name": "second"}, time.time, note=notes.append)
    assert notes[-1].endswith("connection refused")


def test_another_program_at_the_port_is_not_taken_for_a_preflight() -> None:
    with listen(0) as server:

        def answer():
            server.accept()[0].sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        threading.Thread(target=answer, daemon=True).start()
        port = server.getsockname()[1]
        with pytest.raises(MeetingError, match=r"what answers there is no preflight: it sent b'SSH-2.0.*--rdzv-port"):
            open_meeting(place(1, port), {"name": "second"}, time.time)
        with pytest.raises(MeetingError, match=rf"cannot listen on port {port} of 127.0.0.1: address already in use; "):
            open_meeting(place(0, port), {"name": "first"}, time.time)


@pytest.mark.parametrize(
    ("index", "job", "why"),
    [(1, "another", "is of another job"), (0, "job", "there is a host 0 already"), (9, "job", "there is a host 9")],
)
def test_a_host_that_does_not_belong_is_refused(index, job, why) -> None:
    port, found = free_port(), {}
    head = start_head(port, found, wait_s=1.0)
    guest = Place(2, "127.0.0.1", port, job, index, 5.0)
    with pytest.raises(MeetingError, match=why):
        # A host with number 0 would hold the meeting itself, so it comes as if it had another number.
        from papilio.launch.preflight.meeting import _go

        _go(guest, {"name": "intruder"}, time.time, lambda why: None)
    head.join(20)
    assert list(found["absent"]) == [1]


def test_a_rank_that_hangs_is_ended_and_says_where() -> None:
    """One rank of two: the other one never joins."""
    found = measure_links(LinkJob(0, 2, 1, "127.0.0.1", free_port(), timeout_s=0.5))
    assert found.speeds == ()
    assert re.fullmatch(
        r"rank 0 was still (starting|loading|joining the gloo process group) after 0.5 s", found.errors[0]
    )


def test_a_closed_data_port_and_an_unknown_name() -> None:
    port = DataPort("token")
    assert send_parcel("127.0.0.1", port.port, "token") == ""
    assert send_parcel("127.0.0.1", port.port, "other") == "leads to another host than its own"
    port.close()
    assert send_parcel("127.0.0.1", port.port, "token") == "connection refused"
    assert resolve("127.0.0.7") == (("127.0.0.7",), "")
    addresses, error = resolve("nowhere.invalid")
    assert addresses == () and error.startswith("does not resolve (")


def test_a_server_that_swallows_everything_does_not_hold_a_host_up(monkeypatch) -> None:
    monkeypatch.setattr("papilio.launch.preflight.reach.ECHO_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        error = send_parcel("127.0.0.1", mute.getsockname()[1], "token")
    assert (
        error == "opens, but 64 KiB do not come through (no answer within 0.3 s); packets of full size may be dropped"
    )


LISTING = """\
0, NVIDIA H100 80GB HBM3, 81559, 4, 0, Not Active, 31, 570.124.06
1, NVIDIA H100 80GB HBM3, 81559, 61000, 3, Active, 88, 570.124.06
2, Tesla T4, 15360, 0, [N/A], [N/A], 40, 570.124.06
"""


def test_lines_of_nvidia_smi() -> None:
    gpus, driver, error = read_gpus(LISTING)
    assert (driver, error) == ("570.124.06", "")
    assert gpus[1] == Gpu(
        index=1,
        name="NVIDIA H100 80GB HBM3",
        memory_bytes=81_559 << 20,
        used_bytes=61_000 << 20,
        uncorrected_errors=3,
        is_slowed=True,
        celsius=88,
    )
    assert (gpus[0].is_slowed, gpus[2].uncorrected_errors, gpus[2].is_slowed) == (False, None, False)
    assert read_gpus("Unable to determine the device handle for GPU0: GPU is lost\n")[2].startswith("nvidia-smi says:")


def test_a_hash_changes_with_names_and_contents_alone(tmp_path) -> None:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "one.py").write_text("1")
    (tmp_path / "a" / "deep" / "two.toml").write_text("2")
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "two.toml").write_text("2")
    (tmp_path / "b" / "one.py").write_text("1")
    (tmp_path / "b" / "one.pyc").write_text("cache")
    before = folder_hash(tmp_path / "b")
    assert folder_hash(tmp_path / "a") == before
    (tmp_path / "b" / "one.py").write_text("3")
    assert folder_hash(tmp_path / "b") != before
    (tmp_path / "b" / "one.py").rename(tmp_path / "b" / "other.py")
    (tmp_path / "b" / "other.py").write_text("1")
    assert folder_hash(tmp_path / "b") != before


def test_versions_and_hashes_of_this_installation() -> None:
    versions, hashes = installed_versions(), code_hashes()
    assert versions["python"] == sys.version.partition(" ")[0]
    assert {"torch", "torchrec", "numpy"} <= set(versions)
    assert {"launch", "trainer", "sharding", "data_pipeline", "torch", "torchrec"} <= set(hashes)


def test_checksums_are_read_from_where_one_is_told_and_no_more(tmp_path) -> None:
    folder = write_dataset(tmp_path / "data")
    whole = check_data(folder)
    assert (whole.problems, len(whole.checked), whole.num_shards) == ((), 6, 6)
    assert whole.checked_bytes == whole.num_bytes == sum(p.stat().st_size for p in tmp_path.rglob("*.arrow"))
    some = check_data(folder, first_share=0.5, max_bytes=1)
    assert some.checked == (whole.checked[3],)
    assert check_data(str(tmp_path / "none")).problems[0].startswith(f"{tmp_path}/none is not a complete data set")


def test_who_differs_and_who_is_named() -> None:
    assert odd_ones_out({"n1": "a", "n2": "b", "n3": "b"}) == ("b", {"n1": "a"})
    assert odd_ones_out({"n1": "a", "n2": "b"}) == ("a", {"n2": "b"})
    assert named(["n1"], 1) == "n1"
    assert named(["n1", "n2"], 2) == "all 2"
    assert named([f"n{i}" for i in range(7)], 9) == "n0, n1, n2 and 4 more"


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_the_terminal(columns, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    data = write_dataset(tmp_path / "data")
    hosts = [FakeHost(f"127.0.0.1{index}", data, str(tmp_path / "runs")) for index in range(3)]
    hosts[1].probes["free_bytes"] = lambda _: 5 * MB
    run_hosts(hosts, common_options(3))
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if str(tmp_path) not in line]  # a word that cannot be broken
    assert max(map(len, lines)) <= columns
    assert re.search(r"^FAIL  room +127.0.0.11 +4.77 MiB", out, re.MULTILINE)
    assert re.search(r"^ +fix: free some, or choose another disk:", out, re.MULTILINE)
    assert "\nnot ready: 1 thing to fix" in out
    assert "host 1 took part; 127.0.0.10 prints the report" in out


def test_the_component_gives_every_host_its_number_and_the_meeting_place(monkeypatch) -> None:
    app = components.preflight("--json", "--train.epochs=$2", recipe="quickstart", nnodes=3, nproc=2, rdzv_port=1234)
    role = app.roles[0]
    assert role.num_replicas == 3
    values = specs.macros.Values(img_root="", app_id="job_7", replica_id="2", rank0_env="HEAD")
    words = values.apply(role).args
    assert words[1:3] == ["-m", "papilio.launch.start"]
    mark = next(word.removeprefix("--dollar=") for word in words if word.startswith("--dollar="))
    words = [word.replace(mark, "$") for word in words]
    module = words.index("papilio.launch.preflight.worker")
    options = read_options(["--rdzv-endpoint=n1:1234", *words[module + 1 :]])
    assert (options.index, options.job, options.nnodes, options.nproc, options.as_json) == (2, "job_7", 3, 2, True)
    assert (options.overrides, options.rdzv_endpoint) == (("--train.epochs=$2",), "n1:1234")
    assert "--rdzv-port=1234" in words and "--head-node-in=HEAD" in words


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--nnodes", "0"], "--nnodes 0: a number from 1 to 64 is needed"),
        (["--nnodes", "65"], "--nnodes 65: a number from 1 to 64 is needed"),
        (["--nnodes", "-1", "-s", "slurm"], "--nnodes -1: a number from 1 to 10,000 is needed"),
        (["--nproc", "0"], "--nproc 0: a number from 1 to 1,024 is needed"),
        (["--index", "2", "--nnodes", "2", "--rdzv-endpoint", "n1:1"], "--index 2: a number from 0 to 1 is needed"),
        (["--wait-s", "nan"], "--wait-s nan: a number from 1 to 604,800 is needed"),
        (["--data-port", "70000"], "--data-port 70000: a number from 1 to 65,535 is needed"),
        (["--read-gib", "-1"], "--read-gib -1.0: a number from 0 to 1,048,576 is needed"),
        (["-s", "slurm", "--index", "1"], "--rdzv-endpoint and --index are for hosts without a scheduler"),
        (["--recipe", "gone.toml"], "--recipe gone.toml does not exist"),
    ],
)
def test_a_command_line_that_cannot_be_followed(words, error, capsys) -> None:
    assert cli.main(["preflight", "--recipe", "quickstart", *words]) == 2
    assert error in capsys.readouterr().err


def test_the_command_starts_all_hosts_here_and_passes_their_verdict_on(tmp_path) -> None:
    data = write_dataset(tmp_path / "data")
    (tmp_path / "data" / "test" / "1.arrow").unlink()
    command = [
        sys.executable,
        "-m",
        "papilio.launch.cli",
        "preflight",
        "--recipe",
        "quickstart",
        "--nnodes",
        "2",
        "--nproc",
        "1",
    ]
    command += [f"--data.path={data}", f"--output.runs_dir={tmp_path}/runs", "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    report = json.loads(done.stdout)
    assert [finding[0] for finding in findings_of(report)] == ["data"], findings_of(report)
    assert done.returncode == 1
    assert [len(links["speeds"]) for links in report["links"]] == [1, 1]
    assert report["plan"]["num_ranks"] == 2
