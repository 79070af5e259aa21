"""Hosts on one machine: each a network, host-name and mount namespace of its own, on one switch. Needs root.

with HostNamespaces(folder, ["n1", "n2"]) as hosts:
    subprocess.run(hosts.command("n1", ["ping", "-c1", "n2"]))
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

NETWORK = "10.77.3"
# A host, too, beside those that are named; it has all names, and they have its.
SWITCH_ADDRESS = f"{NETWORK}.1"
START_TIMEOUT_S = 20
HOLD = """
hostname "$1"; ip link set lo up
mount --bind "$2/$1.hosts" /etc/hosts
echo ready > "$2/$1.ready"
exec sleep infinity
"""


def why_not_here() -> str:
    """Say what keeps this machine from having such hosts; nothing if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "tc", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (iproute2, util-linux)"
    tried = subprocess.run(
        ["unshare", "-n", "-u", "-m", "ip", "link", "set", "lo", "up"], capture_output=True, check=False
    )
    return "" if tried.returncode == 0 else f"namespaces are not allowed here: {tried.stderr.decode().strip()}"


class HostNamespaces:
    """The hosts; all resolve all names until a line of `hosts_file` is changed."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.names = list(names)
        self._folder = folder
        self._holders: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        try:
            self._start("switch")
            for name in self.names:
                self._start(name)
            self._run("switch", "ip link add br0 type bridge")
            self._run("switch", "ip link set br0 up")
            self._run("switch", f"ip addr add {SWITCH_ADDRESS}/24 dev br0")
            for name in self.names:
                pid = self._holders[name].pid
                self._run("switch", f"ip link add v-{name} type veth peer name eth0 netns {pid}")
                self._run("switch", f"ip link set v-{name} master br0 up")
                self._run(name, f"ip addr add {self.address(name)}/24 dev eth0")
                self._run(name, "ip link set eth0 up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def address(self, name: str) -> str:
        return f"{NETWORK}.{11 + self.names.index(name)}"

    def hosts_file(self, name: str) -> Path:
        """What the host sees as /etc/hosts. Write to it, do not replace it."""
        return self._folder / f"{name}.hosts"

    def command(self, name: str, words: Sequence[str], folder: Path | None = None) -> list[str]:
        """What runs a command on a host, in a folder (default: the one of this process) as the host sees it."""
        enter = ["nsenter", "-t", str(self._holders[name].pid), "-n", "-u", "-m", "--"]
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(folder or Path.cwd()), *words]

    def shape(self, name: str, rate: str) -> None:
        """Limit what a host sends and gets."""
        limit = f"root tbf rate {rate} burst 64kb latency 50ms"
        self._run(name, f"tc qdisc add dev eth0 {limit}")
        self._run("switch", f"tc qdisc add dev v-{name} {limit}")

    def block_port(self, server: str, port: int, client: str) -> None:
        """Let a port of one host give no answer to another one, as behind a firewall."""
        self._run(server, f"ip rule add ipproto tcp sport {port} to {self.address(client)} blackhole")

    def lose(self, name: str) -> None:
        """End a host as a power cut does: nobody hears of it, for the link goes first."""
        self.unplug(name)
        self.kill(name)

    def unplug(self, name: str) -> None:
        """Pull a host's cable: nothing comes or goes, and no connection breaks."""
        self._run("switch", f"ip link set v-{name} down")

    def plug_in(self, name: str) -> None:
        """Put the cable back."""
        self._run("switch", f"ip link set v-{name} up")

    def kill(self, name: str) -> None:
        """Kill all that runs on a host, at once."""
        for pid, _ in self.processes(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, name: str) -> list[tuple[int, list[str]]]:
        """Return what runs on a host: process ids and command lines."""
        holder = self._holders[name].pid
        network = os.readlink(f"/proc/{holder}/ns/net")
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "ns/net") == network and int(process.name) != holder:
                    found.append((int(process.name), (process / "cmdline").read_bytes().decode().split("\0")))
        return found

    def run(self, name: str, command: str) -> None:
        """Run a command line on a host."""
        self._run(name, command)

    def close(self) -> None:
        for holder in self._holders.values():
            holder.kill()
            holder.wait()

    def _start(self, name: str) -> None:
        lines = [
            "127.0.0.1 localhost",
            f"{SWITCH_ADDRESS} switch",
            *(f"{self.address(each)} {each}" for each in self.names),
        ]
        self.hosts_file(name).write_text("\n".join(lines) + "\n")
        words = [
            "unshare",
            "-n",
            "-u",
            "-m",
            "--propagation",
            "private",
            "bash",
            "-ec",
            HOLD,
            "_",
            name,
            str(self._folder),
        ]
        self._holders[name] = subprocess.Popen(words, stderr=subprocess.PIPE)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (self._folder / f"{name}.ready").exists():
            if self._holders[name].poll() is not None or time.monotonic() > deadline:
                self._holders[name].kill()
                raise RuntimeError(f"host {name} did not start: {self._holders[name].communicate()[1].decode()}")
            time.sleep(0.01)

    def _run(self, name: str, command: str) -> None:
        done = subprocess.run(
            ["nsenter", "-t", str(self._holders[name].pid), "-n", "-u", "-m", "--", *command.split()],
            capture_output=True,
            timeout=START_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{command} on {name}: {done.stderr.decode().strip()}")
