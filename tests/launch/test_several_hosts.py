"""What `papilio train` says before it starts a job that would not find its other hosts."""

import argparse
import socket

import pytest

from papilio.launch import roles, several_hosts
from papilio.launch.several_hosts import meeting_of, one_host_of
from papilio.launch.usage import UsageError

OTHER = "192.0.2.7"  # an address for documentation (RFC 5737)


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What names lead to; this host is n1."""
    table = {"n1": OTHER, "n2": "192.0.2.8"}

    def resolve(name: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if name not in table and not name[0].isdigit():
            raise socket.gaierror("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (table.get(name, name), 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "gethostname", lambda: "n1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    return table


def asked(endpoint: str | None = "n1:29400", nnodes: str = "2", wait_s: int = 900) -> argparse.Namespace:
    return argparse.Namespace(nnodes=nnodes, rdzv_endpoint=endpoint, rdzv_id="train", wait_s=wait_s)


def test_hosts_meet_where_the_command_says() -> None:
    meeting = meeting_of(asked(), "runs/mine")
    assert meeting == roles.Meeting("n1:29400", "train", 900)
    words = roles.agent_command(
        ["papilio.trainer.train", "--train.epochs=2"], 3, "1:2", max_restarts=5, meeting=meeting
    )
    (role,) = one_host_of(words, 3).roles
    assert role.num_replicas == 1
    assert role.args[1:3] == ["-m", "papilio.trainer.elastic.agent"]
    assert {
        "--nnodes=1:2",
        "--nproc-per-node=3",
        "--rdzv-endpoint=n1:29400",
        "--rdzv-id=train",
        "--max-restarts=5",
    } <= set(role.args)
    assert any("join_timeout=900" in word and "store_timeout=900" in word for word in role.args)
    assert role.args[-2:] == ["papilio.trainer.train", "--train.epochs=2"]


def test_one_host_meets_nobody() -> None:
    assert meeting_of(asked(None, nnodes="1"), None) is None


@pytest.mark.parametrize(
    ("namespace", "run_dir", "message"),
    [
        (asked(None), "r", r"--nnodes 2 .* needs --rdzv-endpoint HOST:PORT.*as --rdzv-endpoint n1:29400"),
        (asked(nnodes="1"), "r", "say with --nnodes how many hosts meet there"),
        (asked(), None, "needs --output.run_dir=DIR, a folder that all hosts see"),
        (asked("n1"), "r", "write HOST:PORT"),
        (asked("n1:99999"), "r", "write HOST:PORT"),
        (asked("n9:29400"), "r", "n9 does not resolve here; add it to /etc/hosts, or give its address"),
        (asked("127.0.0.1:29400"), "r", "127.0.0.1 leads every host to itself, so each would meet nobody"),
        (asked(wait_s=0), "r", "--wait-s 0: hosts wait for each other at least 1 s"),
        (asked(nnodes="0:2"), "r", "--nnodes 0: a number from 1 to 10,000 is needed"),
    ],
)
def test_what_could_not_meet_is_refused(namespace: argparse.Namespace, run_dir: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        roles.agent_command(["papilio.trainer.train"], 1, namespace.nnodes, meeting=meeting_of(namespace, run_dir))


def test_a_name_that_leads_every_host_home_is_refused(names: dict[str, str]) -> None:
    """Debian writes 127.0.1.1 for a host's own name into its /etc/hosts."""
    names["n2"] = "127.0.1.1"
    with pytest.raises(UsageError, match=r"n2 resolves to 127.0.1.1 here, which leads every host to itself"):
        meeting_of(asked("n2:29400"), "r")


def test_a_host_that_gloo_would_announce_at_a_loopback_address_is_refused(
    names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names["n1"] = "127.0.1.1"
    monkeypatch.setattr(several_hosts, "own_address_towards", lambda host, port: OTHER)
    monkeypatch.setattr(several_hosts, "interface_of", lambda address: {OTHER: "eth0"}[address])
    with pytest.raises(UsageError, match=r"name, n1, leads to 127.0.1.1, and gloo .* export GLOO_SOCKET_IFNAME=eth0"):
        meeting_of(asked("n2:29400"), "r")
