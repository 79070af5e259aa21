"""Hosts of a preflight as threads of one process, with senses that can be told what to feel.

As a program (`python -m tests.support.preflight_hosts ...`, with the worker's arguments) it is one host, whose planner
and links are made up, so that it needs no torch; with --real-links ranks measure them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Thread
from typing import Any

from papilio.launch.preflight.facts import LinkFacts, PlanFacts, RankSpeed
from papilio.launch.preflight.links import LinkJob, measure_links
from papilio.launch.preflight.meeting import MeetingError
from papilio.launch.preflight.wire import free_port
from papilio.launch.preflight.worker import Options, Senses, read_options, take_part
from papilio.trainer.config_file import load_config

MB = 1_000_000
GIB = 1 << 30
VERSIONS = {"python": "3.11.7", "papilio": "0.1.0", "torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}
CODE = {"trainer": "0a1b2c", "launch": "3d4e5f", "torch": "777777"}
PLAN = PlanFacts(
    hardware="cpu_host",
    device="cpu",
    rank_device_bytes=(GIB // 64,) * 6,
    rank_host_bytes=(0,) * 6,
    num_ranks=6,
    model_bytes=40 * MB,
    step_s=0.01,
    samples_per_s=200_000.0,
)


@dataclass
class FakeHost:
    """One host: its name, and whatever is different on it. `mb_per_s` is what it gets from the host before it."""

    name: str
    data: str
    runs: str
    probes: dict[str, Any] = field(default_factory=dict)
    mb_per_s: float = 1000.0
    options: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    status: int | None = None
    error: str = ""

    def take_part(self, common: Options, index: int) -> None:
        options = replace(common, name=self.name, index=index, **self.options)
        config = load_config(
            options.recipe, [f"--data.path={self.data}", f"--output.runs_dir={self.runs}", *self.overrides]
        )
        probes = {
            "versions": lambda: dict(VERSIONS),
            "code": lambda: dict(CODE),
            "gpus": lambda: ((), "", ""),
            "memory_bytes": lambda: 64 * GIB,
            "plan": lambda *_: PLAN,
            "links": lambda job: links_of(job, self.mb_per_s),
            "free_bytes": lambda _: 100 * GIB,
            **self.probes,
        }
        try:
            self.status = take_part(options, config, Senses(**probes))
        except MeetingError as error:
            self.error = str(error)


def links_of(job: LinkJob, mb_per_s: float, message_bytes: int = MB) -> LinkFacts:
    """What ranks would have measured whose host gets so much from the one before, and sends at 1 GB/s."""
    speeds = [
        RankSpeed(
            rank=job.index * job.nproc + local_rank,
            backend="gloo",
            message_bytes=message_bytes,
            all_to_all_s=1e-5,
            all_reduce_s=1e-5,
            neighbour_s=message_bytes / (mb_per_s * MB),
        )
        for local_rank in range(job.nproc)
    ]
    return LinkFacts(speeds=tuple(speeds))


def common_options(num_hosts: int, **options: Any) -> Options:
    """What all hosts of a preflight are told; they meet on loopback at a free port."""
    told = {"rdzv_endpoint": f"127.0.0.1:{free_port()}", "wait_s": 20.0, "job": "test", "host": "cpu_host", **options}
    return Options(recipe="quickstart", overrides=(), nnodes=num_hosts, nproc=1, **told)


def run_hosts(hosts: Sequence[FakeHost], options: Options, *, present: Sequence[int] | None = None) -> None:
    """Run the hosts at once, to the end; those that are not `present` never come."""
    indices = range(len(hosts)) if present is None else present
    threads = [Thread(target=hosts[index].take_part, args=(options, index), daemon=True) for index in indices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a host hangs"


def findings_of(report: Mapping[str, Any], status: str = "FAIL") -> list[tuple[str, list[str], str, str]]:
    """Check, hosts, what was found and fix, of the findings with a status."""
    return [
        (finding["check"], finding["hosts"], finding["found"], finding["fix"])
        for finding in report["findings"]
        if finding["status"] == status
    ]


def main() -> int:
    words = [word for word in sys.argv[1:] if word != "--real-links"]
    options = read_options(words)
    config = load_config(options.recipe, options.overrides)

    def links(job: LinkJob) -> LinkFacts:
        return measure_links(job) if len(words) < len(sys.argv) - 1 else links_of(job, 1000.0)

    try:
        return take_part(options, config, Senses(plan=lambda *_: PLAN, links=links))
    except MeetingError as error:
        print(error, file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
