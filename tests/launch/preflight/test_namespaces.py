"""Preflights of real worker processes on hosts with networks, names and disks of their own."""

import json
import subprocess
import sys

import pytest

from tests.support.datasets import write_dataset
from tests.support.host_namespaces import HostNamespaces, why_not_here
from tests.support.preflight_hosts import findings_of

WHY_NOT = why_not_here()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
PORT = 29_411


@pytest.fixture
def hosts(tmp_path):
    with HostNamespaces(tmp_path, ["n1", "n2", "n3"]) as hosts:
        yield hosts


@pytest.fixture
def run(hosts, tmp_path):
    """Run this program on every host and return the first one's report, all statuses, and what they said otherwise."""
    data = write_dataset(tmp_path / "data")

    def start(program="tests.support.preflight_hosts", *words, names=("n1", "n2", "n3")):
        command = [sys.executable, "-m", program, "--recipe", "quickstart", "--nnodes", "3", "--nproc", "1", "--json"]
        command += ["--rdzv-endpoint", f"n1:{PORT}", "--wait-s", "20", "--job", "test", *words]
        command += [f"--data.path={data}", f"--output.runs_dir={tmp_path}/runs"]
        started = [
            subprocess.Popen(
                hosts.command(name, [*command, "--index", str(int(name[1]) - 1)]),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name in reversed(names)  # the first one last: who does not reach it has said so by then
        ]
        try:
            said = [process.communicate(timeout=60) for process in started[::-1]]
        finally:
            for process in started:
                process.kill()
        assert said[0][0], said
        return json.loads(said[0][0]), [process.returncode for process in started[::-1]], [error for _, error in said]

    return start


def test_names_that_others_lack_and_a_name_that_leads_home(hosts, run) -> None:
    hosts.hosts_file("n3").write_text("127.0.0.1 localhost\n10.77.3.11 n1\n10.77.3.13 n3\n")
    hosts.hosts_file("n2").write_text("127.0.1.1 n2\n10.77.3.11 n1\n10.77.3.13 n3\n")
    report, statuses, _ = run()
    names, interface = findings_of(report)
    assert names[:2] == ("names", ["n2"])
    assert names[2].startswith("its name n2 does not resolve") and names[2].endswith(" on n3")
    assert names[3].startswith('on n3: echo "10.77.3.12 n2" | sudo tee -a /etc/hosts')
    assert interface[:3] == (
        "interface",
        ["n2"],
        "gloo would tell the other hosts to find it at 127.0.1.1, not at 10.77.3.12",
    )
    assert interface[3].startswith("export GLOO_SOCKET_IFNAME=eth0")
    assert statuses == [1, 1, 1]


def test_hosts_that_do_not_reach_the_first_one(hosts, run) -> None:
    hosts.hosts_file("n2").write_text("127.0.0.1 localhost\n10.77.3.12 n2\n10.77.3.13 n3\n")
    hosts.block_port("n1", PORT, "n3")
    report, statuses, errors = run("tests.support.preflight_hosts", "--wait-s", "6")
    nameless, blocked = findings_of(report)
    assert nameless[:3] == ("arrival", ["n2"], f"does not reach the first host at n1:{PORT}: the name does not resolve")
    assert 'echo "ADDRESS n1" | sudo tee -a /etc/hosts' in nameless[3]
    assert blocked[:3] == ("arrival", ["n3"], f"does not reach the first host at n1:{PORT}: no answer")
    assert blocked[3].startswith(f"let TCP pass from there to port {PORT} of n1")
    assert statuses == [1, 3, 3]
    assert f"does not reach the first host at n1:{PORT}: no answer" in errors[2]


def test_a_data_port_that_is_closed_in_one_direction(hosts, run) -> None:
    hosts.block_port("n2", 29_412, "n3")
    report, _, _ = run("tests.support.preflight_hosts", "--data-port", "29412")
    (ports,) = findings_of(report)
    assert ports[:3] == ("ports", ["n2"], "n3 to n2 (10.77.3.12:29412): no answer")
    assert ports[3].startswith("let TCP pass from n3 to n2")


def test_packets_of_full_size_that_are_lost(hosts, run) -> None:
    for name in ("n1", "n3"):  # the switch between them has 1500; single segments, or they would pass as one buffer
        hosts.run(name, "ip link set dev eth0 mtu 9000 gso_max_segs 1")
    report, _, _ = run()
    (ports,) = findings_of(report)
    assert ports[:2] == ("ports", ["n1", "n3"])
    assert ports[2].startswith("n1 to n3 (10.77.3.13:") and "), and back: opens, but 64 KiB do not come" in ports[2]
    assert ports[3].endswith("the same MTU: ip link set dev INTERFACE mtu 1500")


def test_a_full_disk(hosts, run, tmp_path) -> None:
    (tmp_path / "runs").mkdir()
    hosts.run("n2", f"mount -t tmpfs -o size=4k tmpfs {tmp_path}/runs")
    hosts.run("n2", f"cp /etc/hosts {tmp_path}/runs/more")
    report, _, _ = run()
    (full,) = findings_of(report)
    assert full[:2] == ("run folder", ["n2"])
    assert full[2].startswith(f"could not write {tmp_path}/runs/") and full[2].endswith("No space left on device")
    assert full[3] == "free space there, or choose a folder on another disk (--output.runs_dir)"


def test_a_slow_link_is_measured(hosts, run, tmp_path) -> None:
    """Real ranks, one host shaped to 40 Mbit/s and held against the others: no profile is named."""
    hosts.shape("n3", "40mbit")
    report, statuses, _ = run("tests.support.preflight_hosts", "--real-links")
    links = [finding for finding in findings_of(report) if finding[0] == "links"]
    assert [finding[1] for finding in links] == [["n3"]], links
    assert "a rank between it and both its neighbours" in links[0][2]
    measured = [host["speeds"][0]["message_bytes"] / host["speeds"][0]["neighbour_s"] for host in report["links"]]
    assert measured[0] == pytest.approx(5e6, rel=0.2)  # from n3 to n1: 40 Mbit/s is 5 MB/s
    assert measured[2] == pytest.approx(5e6, rel=0.2)  # from n2 to n3
    assert measured[1] > 10e6
    assert statuses == [1, 1, 1]
