"""The store of a rendezvous stops answering, or is another one than before."""

import contextlib
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.launcher.api import LaunchConfig

from papilio.trainer.elastic import agent
from papilio.trainer.elastic import store as rendezvous_store
from papilio.trainer.elastic.rendezvous import open_rendezvous
from papilio.trainer.elastic.store import HELLO, Backend, ForeignListenerError, StoreAddress, store_server
from tests.support.agents import free_port, wait_until

REPOSITORY = Path(__file__).resolve().parents[3]


def launch_config(port: int, **settings: object) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=2,
        nproc_per_node=1,
        run_id="job",
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port}",
        rdzv_configs={"last_call_timeout": 1, "keep_alive_interval": 1, "is_host": 0, **settings},
    )


def test_a_name_that_an_ended_job_has_used_is_used_anew() -> None:
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ended = open_rendezvous(launch_config(server.port), ["train"], print)
    ended.next_rendezvous()
    assert ended.shutdown()
    new = open_rendezvous(launch_config(server.port), ["train", "--other"], print)
    assert (ended.get_run_id(), new.get_run_id()) == ("job", "job.1")
    assert new.next_rendezvous().world_size == 1
    new.shutdown()


def test_a_store_that_was_started_anew_makes_the_hosts_join_anew() -> None:
    said: list[str] = []
    port = free_port()
    server = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    rendezvous = open_rendezvous(launch_config(port), ["train"], said.append)
    rendezvous.next_rendezvous()
    assert rendezvous.num_nodes_waiting() == 0
    del server
    num_waiting: list[int] = []

    def is_reported() -> bool:
        num_waiting.append(rendezvous.num_nodes_waiting())
        return bool(said)

    wait_until(is_reported, "the report of the outage")
    assert not any(num_waiting), "the ranks are left alone"
    assert said == [f"the store at localhost:{port} does not answer (connection refused); the ranks continue"]
    server = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    wait_until(lambda: rendezvous.num_nodes_waiting() > 0, "the new store to be found")
    assert said[1:] == [
        f"the store at localhost:{port} answers again",
        f"the store at localhost:{port} is a new one; the ranks save, and the hosts join anew",
    ]
    assert rendezvous.next_rendezvous().world_size == 1
    assert rendezvous.num_nodes_waiting() == 0
    rendezvous.shutdown()
    del server


def test_a_store_that_never_comes_is_named() -> None:
    port = free_port()
    with pytest.raises(
        RendezvousConnectionError, match=rf"the store at localhost:{port} did not answer for 1 s \(conn"
    ):
        open_rendezvous(launch_config(port, join_timeout=1), [], print)


@contextlib.contextmanager
def listener(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A program at a port, which answers each connection in a thread of its own; all are kept open until the end."""
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as kept:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection = kept.enter_context(server.accept()[0])
                    threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def speak_http(connection: socket.socket) -> None:
    heard = b""
    while b"\n" not in heard:
        part = connection.recv(100)
        if not part:
            return
        heard += part
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n<html>")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (speak_http, r"it says 'HTTP/1\.1 400 Bad Request'"),
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"), r"it says 'SSH-2\.0-OpenSSH_9\.2'"),
        (lambda connection: connection.shutdown(socket.SHUT_RDWR), "it closes every connection"),
        (lambda connection: None, "it takes connections and says nothing"),
    ],
    ids=["http", "ssh", "closes", "mute"],
)
def test_another_program_at_the_port_is_named_long_before_the_wait_is_over(
    answer: Callable[[socket.socket], None], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous_store, "MUTE_S", 0.0)
    monkeypatch.setattr(rendezvous_store, "CONNECT_TIMEOUT_S", 0.2)
    with listener(answer) as port, pytest.raises(ForeignListenerError) as refused:
        open_rendezvous(launch_config(port, join_timeout=3_600), [], print)
    start = rf"what answers at localhost:{port} is not a Papilio rendezvous \({why}\): another program has that port\. "
    assert re.match(start, str(refused.value))


def test_an_agent_that_meets_another_program_leaves_with_78(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agent.signal, "signal", lambda number, handler: None)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with listener(lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")) as port:
        words = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-conf=is_host=0"]
        assert agent.main([*words, "--rdzv-id=job", "-m", "a_module"]) == 78
    assert f"papilio: error: what answers at localhost:{port} is not a Papilio rendezvous" in capsys.readouterr().err


def test_a_store_is_no_other_program() -> None:
    """In either of torch's two implementations of it: its greeting is written out here, as torch has no call for it."""
    for use_libuv in (True, False):
        server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, use_libuv=use_libuv)
        assert StoreAddress("localhost", server.port).look() is None


def test_a_question_that_is_never_answered_ends() -> None:
    server = store_server("localhost", 0)
    assert server is not None
    backend = Backend(StoreAddress("localhost", server.port), server)
    with pytest.raises(RendezvousConnectionError, match="does not answer: no answer"):
        backend.call("get", "a key that nobody writes")
    assert backend.call("add", "number", 3) == 3


def test_the_store_of_papilio_rendezvous_ends_by_a_signal_and_refuses_a_taken_port() -> None:
    command = [sys.executable, "-m", "papilio.launch.cli", "rendezvous", "--port"]
    holder = subprocess.Popen(
        [*command, "0"], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    port = holder.stdout.readline().rpartition(":")[2].strip()
    client = dist.TCPStore("localhost", int(port), is_master=False)
    client.set("key", "value")
    assert client.get("key") == b"value"
    greeting = HELLO[:5]  # after which the store takes what comes for questions
    huge = b"\xff" * 16
    for hostile in (b"GET / HTTP/1.1\r\n\r\n", bytes(range(255, 0, -1)), greeting[:3], greeting + b"\1" + huge):
        with socket.create_connection(("127.0.0.1", int(port))) as connection:
            connection.sendall(hostile)
    client.set("key", "still there")
    assert client.get("key") == b"still there"
    other = subprocess.run([*command, port], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert other.returncode == 1
    assert f"papilio rendezvous: error: cannot hold a store at port {port}" in other.stderr
    assert "take another one with --port" in other.stderr
    holder.terminate()
    assert holder.wait(120) == 0
    assert re.fullmatch(r"papilio rendezvous: ended by SIGTERM; jobs that meet here lose it\n", holder.stderr.read())
