"""A real Slurm cluster for tests, without root: munged, slurmctld and a slurmd for each host, all on loopback.

    with SlurmCluster(find_slurm(), num_hosts=2) as cluster:
        subprocess.run(["sbatch", ...], env=cluster.environment)

Hosts are called 127.0.0.11, 127.0.0.12, ...: names that resolve without any change to the system. Everything lies in
one folder, which goes when the cluster does.

With `namespaces` (tests/support/host_namespaces.py, for which one must be root) slurmctld and each host have a network
of their own, so that a host can be lost for real. Slurm's commands then work on these hosts only: `cluster.command`.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.host_namespaces import SWITCH_ADDRESS, HostNamespaces
from tests.support.slurm_accounting import CLUSTER_CONFIG, database_socket, start_database, start_slurmdbd
from tests.support.slurm_programs import SlurmPrograms

START_TIMEOUT_S = 30
POLL_S = 0.05
# Where slurmctld and munged run, among hosts of their own.
CONTROLLER = "switch"
# Marks the processes of a cluster, and of one host of it, also those that outlive their parents.
CLUSTER_MARK, HOST_MARK = "SLURM_CLUSTER_OF_TEST", "SLURM_HOST_OF_TEST"

# Notes on what is not obvious:
# backfill        torchx submits several replicas as a heterogeneous job, which sched/builtin never starts
# config_overrides  the hosts share one machine and claim the CPUs and the memory written here
# cred_expire     also the time for which Slurm holds back a requeued job: 120 s by default, 5 at least
# MessageTimeout, KillWait  pass after the loss of a host before its job is requeued; but in KillWait ranks save, too
# linuxproc, none no cgroups, no root
CONFIG = """
ClusterName=test
SlurmctldHost={machine}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout={host_timeout_s}
KillWait=20
MessageTimeout=2
MinJobAge={job_age_s}
"""


class SlurmCluster:
    """Slurm's daemons as children of this process."""

    def __init__(
        self,
        programs: SlurmPrograms,
        num_hosts: int = 2,
        *,
        cpus_per_host: int = 2,
        memory_mb: int = 6000,
        host_timeout_s: int = 20,
        job_age_s: int = 600,
        with_accounting: bool = False,
        namespaces: HostNamespaces | None = None,
    ) -> None:
        """A job that has ended is forgotten after `job_age_s`; a host that is silent for `host_timeout_s` is down.

        `with_accounting` needs programs that were found with it. `namespaces` are the hosts, and open.
        """
        self._programs = programs
        # Not pytest's folder: the path of a socket must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm_"))
        self._namespaces = namespaces
        self.hosts = namespaces.names if namespaces else [f"127.0.0.{11 + index}" for index in range(num_hosts)]
        self._cpus, self._memory_mb = cpus_per_host, memory_mb
        self._host_timeout_s, self._job_age_s = host_timeout_s, job_age_s
        self._has_accounting = with_accounting
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **{name: value for name, value in programs.environment().items() if not name.startswith("SLURM_")},
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            CLUSTER_MARK: str(self.folder),
        }

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def command(self, words: Sequence[str], host: str = CONTROLLER) -> list[str]:
        """Return what runs a command where Slurm's daemon for this host does."""
        return self._namespaces.command(host, words) if self._namespaces else list(words)

    def run(self, *command: str, timeout_s: float = 30) -> str:
        """Run one of Slurm's commands and return what it printed."""
        done = subprocess.run(
            self.command(command), env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def start_host(self, host: str) -> None:
        """Start the slurmd of one host."""
        stepd = ["-d", self._programs.stepd] if self._programs.stepd else []
        self._start_daemon(host, ["slurmd", "-D", "-N", host, *stepd], {HOST_MARK: host})

    def kill_host(self, host: str) -> None:
        """End everything that runs on a host at once, as a power cut does; Slurm learns of it after a while."""
        if self._namespaces:
            self._namespaces.lose(host)
            self._daemons.pop(host).wait()
            return
        self._daemons.pop(host).kill()
        for pid in [*pids_with(HOST_MARK, host, self.folder), *pids_with("SLURMD_NODENAME", host, self.folder)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # On loopback the others hear of it at once; Slurm itself would after SlurmdTimeout.
        self.run("scontrol", "update", f"NodeName={host}", "State=DOWN", "Reason=lost")

    def wait_for_idle_hosts(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until all hosts that run are known to be idle."""
        count = sum(host in self._daemons for host in self.hosts)
        self._wait(lambda: self._num_idle() == count, "idle hosts", timeout_s)

    def close(self) -> None:
        """End the daemons and whatever they started, and remove their files."""
        for daemon in self._daemons.values():
            daemon.kill()
        for pid in pids_with(CLUSTER_MARK, str(self.folder), self.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        for name in ("munge", "state", "log", "no_cgroups", *(f"spool.{host}" for host in self.hosts)):
            (self.folder / name).mkdir(mode=0o755)
        accounting_port = self._write_config()
        self._start_munge()
        if self._has_accounting:
            self._start_accounting(accounting_port)
        self._start_daemon("slurmctld", ["slurmctld", "-D", "-f", self.environment["SLURM_CONF"]])
        for host in self.hosts:
            self.start_host(host)
        self.wait_for_idle_hosts()

    def _write_config(self) -> int:
        """Write slurm.conf and cgroup.conf; return the port that is left for slurmdbd."""
        own_name = CONTROLLER if self._namespaces else socket.gethostname().partition(".")[0]
        ports = free_ports(2 + len(self.hosts))
        config = CONFIG.format(
            folder=self.folder,
            machine=own_name,
            address=SWITCH_ADDRESS if self._namespaces else "127.0.0.1",
            user=getpass.getuser(),
            port=ports[0],
            host_timeout_s=self._host_timeout_s,
            job_age_s=self._job_age_s,
        )
        if self._programs.plugins:
            config += f"PluginDir={self._programs.plugins}\n"
        for host, port in zip(self.hosts, ports[1:-1], strict=True):
            where = (host, self._namespaces.address(host)) if self._namespaces else (own_name, host)
            config += f"NodeName={host} NodeHostname={where[0]} NodeAddr={where[1]} Port={port} "
            config += f"CPUs={self._cpus} RealMemory={self._memory_mb}\n"
        config += f"PartitionName=main Nodes={','.join(self.hosts)} Default=YES State=UP\n"
        if self._has_accounting:
            config += CLUSTER_CONFIG.format(folder=self.folder, port=ports[-1])
        (self.folder / "slurm.conf").write_text(config)
        # 22.05 always loads a cgroup plugin; v1 on an empty folder does nothing.
        is_old = self._programs.version() < (23, 11)
        plugin = f"cgroup/v1\nCgroupMountpoint={self.folder}/no_cgroups" if is_old else "disabled"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        return ports[-1]

    def _start_accounting(self, port: int) -> None:
        start_database(self._programs, self.folder, self._start_daemon)
        self._wait(database_socket(self.folder).exists, "the database")
        start_slurmdbd(self._programs, self.folder, port, self._start_daemon)

        def is_up() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        self._wait(is_up, "slurmdbd")

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        key = folder / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        self._start_daemon("munged", ["munged", "--foreground", "--force", *options])
        self._wait((folder / "socket").exists, "munged")

    def _start_daemon(self, name: str, command: list[str], marks: dict[str, str] | None = None) -> None:
        log = self.folder / "log" / f"{name}.out"
        with log.open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                self.command(command, name if name in self.hosts else CONTROLLER),
                env={**self.environment, **(marks or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def _num_idle(self) -> int:
        command = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        done = subprocess.run(
            self.command(command), env=self.environment, capture_output=True, text=True, timeout=30, check=False
        )
        return sum(int(word) for word in done.stdout.split() if word.isdigit())

    def _wait(self, condition: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            for name, daemon in self._daemons.items():
                assert daemon.poll() is None, f"{name} ended: {self._tail(name)}"
            assert time.monotonic() < deadline_s, f"waited in vain for {what}: {self._tail('slurmctld')}"
            time.sleep(POLL_S)

    def _tail(self, name: str) -> str:
        logs = [path for path in (self.folder / "log").glob(f"*{name}*") if path.is_file()]
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in logs)


def pids_with(variable: str, value: str, cluster: Path) -> Iterator[int]:
    """Processes of a cluster that have this in the environment they were started with."""
    wanted = {f"{variable}={value}".encode(), f"{CLUSTER_MARK}={cluster}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = set((process / "environ").read_bytes().split(b"\0"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if wanted <= environment and int(process.name) != os.getpid():
            yield int(process.name)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now, below those that the kernel gives to others."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    while len(found) < count:
        port = secrets.randbelow(low - 10_000) + 10_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            found += [port] if port not in found else []
    return found
