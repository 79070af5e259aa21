"""Let things die on a job of several hosts, and measure how long it takes until that is said and fixed.

    python -m benchmarks.host_loss [--repeats 3] [--json FILE] [--only elastic,outside,three,fixed]

Needs root: hosts are network namespaces of this machine (tests/support/host_namespaces.py), each with one rank of a
small real training job that `papilio train --nnodes ... --rdzv-endpoint ...` started. Time to detection is from the
event to the first line about it on a host that survives; time to recovery is from the event (or, where something comes
back, from that) to the first step trained on the ranks that are there then, start of new processes included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults_data import TYPES_OF_CHANGING_RANKS, Size, write_data, write_recipe
from tests.support.host_jobs import HostJob, prepare, rounds, wait_until
from tests.support.host_namespaces import HostNamespaces, why_not_here

SIZE = Size({"a": 3_000, "b": 2_000, "c": 1_000, "d": 20}, 1_003, 25, 100_000, 16, 50)
STEP_S = 0.02
SHORT_S = 6.0
TIMEOUT_S = 180
PORT = 29400
FOREVER = 1 << 40
# What agents and ranks say of others' troubles, and of being told to end.
TROUBLE = ("failed first", "went away", "no heartbeat", "does not answer", "asked to stop", "lost the other ranks")
JOINING = ("another host joins", "starting again", "joining anew")


class Cluster:
    """Hosts, the job on them, and the times measured: seconds to detection and to recovery, by event."""

    def __init__(self, hosts: HostNamespaces, folder: Path, nnodes: str, store: str) -> None:
        self.hosts, self.folder = hosts, folder
        self.times: dict[str, tuple[float | None, float]] = {}
        self.jobs: dict[str, HostJob] = {}
        prepare(folder, FOREVER, STEP_S)
        write_data(str(folder / "data"), SIZE)
        recipe = write_recipe(str(folder / "recipe.toml"), str(folder / "data"), SIZE, TYPES_OF_CHANGING_RANKS)
        self._command = ["-m", "papilio.launch.cli", "train", "--recipe", recipe, "--nproc", "1", "--nnodes", nnodes]
        self._command += ["--rdzv-endpoint", f"{store}:{PORT}", "--max-restarts", "100"]
        self._command += [f"--output.run_dir={folder / 'run'}"]
        self._command += ["--checkpoint.keep_best=false", "--train.evaluate_every_steps=1000000"]

    def start(self, *names: str) -> None:
        """Type the job's command on these hosts."""
        for name in names:
            self.jobs[name] = HostJob(self.hosts, name, self._command, self.folder)

    def store_server(self, name: str) -> None:
        """Hold the store on a host, and return once it is there."""
        words = ["-m", "papilio.launch.cli", "rendezvous", "--port", str(PORT)]
        self.jobs[name] = HostJob(self.hosts, name, words, self.folder)
        self.jobs[name].wait_for("the store is at")

    def measure(
        self,
        event: str,
        cause: Callable[[], object],
        num_ranks: int,
        witness: str | None = None,
        signs: tuple[str, ...] = TROUBLE,
    ) -> None:
        """Let it happen, and wait for the word of the witness and for the first step of a new round."""
        num_rounds = len(rounds(self.folder))
        begin_s = time.monotonic()
        cause()
        said_s = self._told(begin_s, witness, signs) if witness is not None else None
        trained_s = self._trained(num_rounds, num_ranks)
        self._note(event, None if said_s is None else said_s - begin_s, trained_s - begin_s)

    def measure_silence(self, event: str, name: str, witness: str) -> None:
        """Pull the cable for a short time: recovery is from the moment at which it is in again."""
        num_rounds = len(rounds(self.folder))
        begin_s = time.monotonic()
        self.hosts.unplug(name)
        time.sleep(SHORT_S)
        self.hosts.plug_in(name)
        back_s = time.monotonic()
        size = self._newest_log().stat().st_size
        wait_until(lambda: self._newest_log().stat().st_size > size, event, TIMEOUT_S)
        trained_s = time.monotonic()
        said_s = self._told(begin_s, witness, TROUBLE)
        assert len(rounds(self.folder)) == num_rounds, "ranks were started again after a short silence"
        self._note(event, said_s - begin_s, trained_s - back_s)

    def end_rank(self, name: str) -> None:
        """Kill the rank of a host."""
        self._kill(name, "papilio.trainer.train")

    def end_agent(self, name: str) -> None:
        """Kill the agent of a host."""
        self._kill(name, "papilio.trainer.elastic.agent")

    def terminate(self, name: str) -> None:
        """Send SIGTERM to the command on a host."""
        self.jobs[name].terminate()

    def _kill(self, name: str, module: str) -> None:
        for pid, words in self.hosts.processes(name):
            if "-m" in words and words[words.index("-m") + 1] == module:
                os.kill(pid, 9)

    def _told(self, begin_s: float, witness: str, signs: tuple[str, ...]) -> float:
        found: list[float] = []

        def is_there() -> bool:
            lines = list(self.jobs[witness].lines)
            found[:] = [at_s for at_s, line in lines if at_s > begin_s and any(sign in line for sign in signs)]
            return bool(found)

        wait_until(is_there, f"a word of {witness}", TIMEOUT_S, lambda: self.jobs[witness].output)
        return found[0]

    def _trained(self, num_rounds: int, num_ranks: int) -> float:
        def is_trained() -> bool:
            new = rounds(self.folder)[num_rounds:]
            logs = [Path(each.samples_path(0)) for each in new if each.world_size == num_ranks]
            return any(log.exists() and '"step"' in log.read_text() for log in logs)

        def outputs() -> str:
            return "\n".join(f"--- {name}\n{job.output}" for name, job in self.jobs.items())

        wait_until(is_trained, f"a step on {num_ranks} ranks\n", TIMEOUT_S, outputs)
        return time.monotonic()

    def _newest_log(self) -> Path:
        return Path(rounds(self.folder)[-1].samples_path(0))

    def _note(self, event: str, said_s: float | None, trained_s: float) -> None:
        self.times[event] = (said_s, trained_s)
        print(f"  {event}: {_seconds(said_s)} {_seconds(trained_s)}", file=sys.stderr, flush=True)


def elastic(cluster: Cluster) -> None:
    """Two hosts, one of them enough; the first holds the store."""
    hosts, measure = cluster.hosts, cluster.measure
    measure("start of two hosts", lambda: cluster.start("n1", "n2"), 2)
    measure("rank killed", lambda: cluster.end_rank("n2"), 2, "n1")
    measure("agent killed: goes on without that host", lambda: cluster.end_agent("n2"), 1, "n1")
    measure("host whose agent was killed comes again: grows", lambda: cluster.start("n2"), 2, "n1", JOINING)
    measure("host lost: shrinks", lambda: hosts.kill("n2"), 1, "n1")
    measure("lost host comes back: grows", lambda: cluster.start("n2"), 2, "n1", JOINING)
    measure("host without power: shrinks", lambda: hosts.lose("n2"), 1, "n1")
    hosts.plug_in("n2")
    measure("host whose power is back: grows", lambda: cluster.start("n2"), 2, "n1", JOINING)
    cluster.measure_silence(f"link down for {SHORT_S:.0f} s: goes on", "n2", "n1")
    measure("link down for long: shrinks", lambda: hosts.unplug("n2"), 1, "n1")
    measure("link up again: grows", lambda: hosts.plug_in("n2"), 2, "n1", JOINING)
    measure("SIGTERM to one host: saves, shrinks", lambda: cluster.terminate("n2"), 1, "n1")
    measure("host that was told to end comes again: grows", lambda: cluster.start("n2"), 2, "n1", JOINING)

    def lose_store() -> None:
        hosts.kill("n1")
        cluster.jobs["n2"].wait_for("waiting up to ")
        cluster.start("n1")

    measure("host with the store lost, started again at once", lose_store, 2, "n2")


def outside(cluster: Cluster) -> None:
    """Two hosts, one of them enough; the store is on a third."""
    cluster.store_server("n3")
    cluster.measure("start of two hosts, store outside", lambda: cluster.start("n1", "n2"), 2)
    cluster.measure("store outside: host lost, shrinks", lambda: cluster.hosts.kill("n1"), 1, "n2")
    cluster.measure("store outside: it comes back, grows", lambda: cluster.start("n1"), 2, "n2", JOINING)

    def lose_store() -> None:
        cluster.hosts.kill("n3")
        cluster.jobs["n2"].wait_for("does not answer")
        cluster.store_server("n3")

    cluster.measure("store itself lost, started again at once", lose_store, 2, "n2")


def three(cluster: Cluster) -> None:
    """Three hosts, two of them enough."""
    cluster.measure("start of three hosts", lambda: cluster.start("n1", "n2", "n3"), 3)
    cluster.measure("one of three hosts lost: shrinks", lambda: cluster.hosts.kill("n3"), 2, "n1")
    cluster.measure("third host comes back: grows", lambda: cluster.start("n3"), 3, "n1", JOINING)


def fixed(cluster: Cluster) -> None:
    """Two hosts, both needed."""
    cluster.measure("start of two hosts, both needed", lambda: cluster.start("n1", "n2"), 2)

    def lose() -> None:
        cluster.hosts.kill("n2")
        cluster.jobs["n1"].wait_for("failed first")
        cluster.start("n2")

    cluster.measure("both needed: host lost, started again at once", lose, 2, "n1")


SCENES = {"elastic": (elastic, "1:2", "n1"), "outside": (outside, "1:2", "n3"), "three": (three, "2:3", "n1")}
SCENES["fixed"] = (fixed, "2", "n1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--only", default=",".join(SCENES), help="scenes, with commas between them")
    parser.add_argument("--json", metavar="FILE", help="all times")
    options = parser.parse_args()
    if why_not_here():
        print(f"host_loss: {why_not_here()}", file=sys.stderr)
        return 2
    times: dict[str, list[tuple[float | None, float]]] = {}
    for name in options.only.split(","):
        for repeat in range(options.repeats):
            print(f"{name}, {repeat + 1} of {options.repeats}", file=sys.stderr, flush=True)
            for event, measured in run_scene(name).items():
                times.setdefault(event, []).append(measured)
    if options.json:
        Path(options.json).write_text(json.dumps(times, indent=1))
    print(format_table(times))
    return 0


def run_scene(name: str) -> dict[str, tuple[float | None, float]]:
    scene, nnodes, store = SCENES[name]
    with tempfile.TemporaryDirectory(prefix="host_loss_") as folder:
        place = Path(folder)
        (place / "hosts").mkdir()
        with HostNamespaces(place / "hosts", ["n1", "n2", "n3"]) as hosts:
            cluster = Cluster(hosts, place / "job", nnodes, store)
            try:
                scene(cluster)
            finally:
                for host in hosts.names:
                    hosts.kill(host)
                for job in cluster.jobs.values():
                    job.wait()
            return cluster.times


def format_table(times: dict[str, list[tuple[float | None, float]]]) -> str:
    """Return the medians, with the longest in brackets."""
    lines = ["| event | to detection, s | to recovery, s |", "|---|---|---|"]
    for event, measured in times.items():
        said = [said_s for said_s, _ in measured if said_s is not None]
        lines.append(f"| {event} | {_spread(said)} | {_spread([trained_s for _, trained_s in measured])} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({max(values):.1f})" if values else "-"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
