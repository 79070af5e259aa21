"""One host's part of a preflight: `python -m papilio.launch.preflight.worker --recipe R --nnodes N ...`, on every host.

The hosts meet at the first one over plain TCP, find out what they can without torch, let their ranks measure the links,
and send all to the first host, which judges it and prints the table. Nothing waits without a limit.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from papilio.data_pipeline.errors import PapilioError, report_error
from papilio.data_pipeline.verification import check_data
from papilio.launch.preflight.checks import judge
from papilio.launch.preflight.facts import Card, DataFacts, Gpu, HostFacts, LinkFacts, PlanFacts
from papilio.launch.preflight.finding import Evidence
from papilio.launch.preflight.folders import SharedFolder, written_folders
from papilio.launch.preflight.gpus import query_gpus
from papilio.launch.preflight.installed import code_hashes, installed_versions
from papilio.launch.preflight.links import LinkJob, measure_links
from papilio.launch.preflight.machine import memory_bytes, num_cores, shared_memory_bytes
from papilio.launch.preflight.meeting import Meeting, MeetingError, Place, holds_meeting, open_meeting
from papilio.launch.preflight.planning import plan_job
from papilio.launch.preflight.reach import DataPort, gloo_address, interface_of, reach_all
from papilio.launch.preflight.report import format_report, report_as_json
from papilio.launch.preflight.wire import free_port
from papilio.launch.usage import UsageError
from papilio.trainer.checkpoint.compatibility import shared_settings
from papilio.trainer.config import Config
from papilio.trainer.config_file import load_config
from papilio.trainer.elastic.addresses import is_loopback
from papilio.trainer.storage.api import free_bytes

FACTS_TIMEOUT_S = 300.0
READ_S_PER_GIB = 60.0  # from a slow disk over a slow network
LINKS_TIMEOUT_S = 180.0
VERDICT_TIMEOUT_S = 400.0
GIB = 1 << 30
# TorchX's own Slurm jobs have a group of one host for each replica.
HET_GROUP = "SLURM_JOB_NODELIST_HET_GROUP_"


@dataclass(frozen=True)
class Options:
    """What the hosts of one preflight have in common, and which of them this is."""

    recipe: str
    overrides: tuple[str, ...]
    nnodes: int
    nproc: int
    host: str | None = None
    rdzv_endpoint: str = "localhost:29500"
    index: int | None = None
    job: str = "preflight"
    wait_s: float = 120.0
    data_port: int = 0
    read_gib: float = 1.0
    measures_links: bool = True
    as_json: bool = False
    failure_status: int = 1
    name: str | None = None


@dataclass(frozen=True)
class Senses:
    """How a host learns what a test cannot arrange for real on one machine."""

    now: Callable[[], float] = time.time
    free_bytes: Callable[[str], int | None] = free_bytes
    versions: Callable[[], dict[str, str]] = installed_versions
    code: Callable[[], dict[str, str]] = code_hashes
    memory_bytes: Callable[[], int] = memory_bytes
    gpus: Callable[[], tuple[tuple[Gpu, ...], str, str]] = query_gpus
    data_port: Callable[[str, int], DataPort] = DataPort
    links: Callable[[LinkJob], LinkFacts] = measure_links
    plan: Callable[[str, Sequence[str], str | None, int, int], PlanFacts] = plan_job


def main(arguments: Sequence[str] | None = None) -> int:
    """Take part in a preflight; 0 when no check failed on any host, 1 if they did not meet, else --failure-status."""
    options = read_options(arguments)
    try:
        config = load_config(options.recipe, options.overrides)
        return options.failure_status if take_part(options, config) else 0
    except PapilioError as error:
        report_error("papilio preflight", error)
        return 1 if error.is_retryable else options.failure_status


def take_part(options: Options, config: Config, probes: Senses | None = None) -> int:
    """Do this host's part and return the exit status, which is the same on all hosts that come to the end.

    Raises:
        MeetingError: this host cannot take part.
    """
    probes = probes or Senses()
    begin_s = time.monotonic()
    token = secrets.token_hex(8)
    folders = [
        SharedFolder(path, options.job, probes.free_bytes) for path in written_folders(config.output, config.checkpoint)
    ]
    for folder in folders:
        folder.leave_mark(token)
    place = make_place(options)
    if holds_meeting(place):
        folders[0].forget_absences()
    data_port = _open_data_port(options, token, probes)
    name = options.name or socket.getfqdn()

    def note(why: str) -> None:
        folders[0].report_absence(options.index, name, why)

    card = Card(name=name, data_port=data_port.port, gloo_address=gloo_address(socket.gethostname()), token=token)
    meeting = open_meeting(place, card.model_dump(), probes.now, note=note, absences=folders[0].absences, tell=_tell)
    try:
        return _Part(options, config, probes, meeting, folders, begin_s).finish()
    finally:
        data_port.close()
        meeting.close()
        if meeting.is_head:
            for folder in folders:
                folder.clean_up()


class _Part:
    """What happens on a host once the hosts have met."""

    def __init__(
        self,
        options: Options,
        config: Config,
        probes: Senses,
        meeting: Meeting,
        folders: list[SharedFolder],
        begin_s: float,
    ) -> None:
        self._options = options
        self._config = config
        self._probes = probes
        self._meeting = meeting
        self._folders = folders
        self._begin_s = begin_s
        self._hardware = options.host or config.sharding.hardware
        self._cards = [Card.model_validate(card) if card else None for card in meeting.roster]

    def finish(self) -> int:
        meeting = self._meeting
        with ThreadPoolExecutor(1) as pool:
            planning = pool.submit(self._plan) if meeting.is_head else None
            timeout_s = FACTS_TIMEOUT_S + self._options.read_gib * READ_S_PER_GIB
            facts = meeting.gather("facts", self._facts().model_dump(), timeout_s)
            found = [HostFacts.model_validate(each) if each else None for each in facts]
            links, why_no_links = self._measure_links(found)
            failed = self._report(found, links, why_no_links, planning) if planning else None
        verdict = meeting.gather("verdict", failed, VERDICT_TIMEOUT_S)[0]
        if not meeting.is_head and not self._options.as_json:
            first = self._cards[0]
            where = first.name if first else meeting.place.head
            print(f"papilio preflight: host {meeting.index} took part; {where} prints the report", flush=True)
        return int(verdict)

    def _plan(self) -> PlanFacts:
        options = self._options
        return self._probes.plan(options.recipe, options.overrides, self._hardware, options.nnodes, options.nproc)

    def _facts(self) -> HostFacts:
        """Find out all that needs no torch."""
        tokens = [card.token for card in self._cards if card is not None]
        own = self._cards[self._meeting.index]
        gpus, driver, gpu_error = self._probes.gpus()
        return HostFacts(
            clock_ahead_s=self._meeting.clock_ahead_s,
            clock_error_s=self._meeting.clock_error_s,
            versions=self._probes.versions(),
            code=self._probes.code(),
            settings=shared_settings(self._config.model_dump(mode="json")),
            reached=reach_all(self._meeting.index, self._cards),
            interface=interface_of(own.address) if own else "",
            gpus=gpus,
            gpu_error=gpu_error,
            driver=driver,
            num_cores=num_cores(),
            memory_bytes=self._probes.memory_bytes(),
            shared_memory_bytes=shared_memory_bytes(),
            folders=tuple(folder.look(tokens) for folder in self._folders),
            data=self._check_data(),
        )

    def _check_data(self) -> DataFacts:
        path, share = self._config.data.path, self._meeting.index / self._options.nnodes
        check = check_data(path, first_share=share, max_bytes=int(self._options.read_gib * GIB))
        return DataFacts(
            path=path,
            problems=check.problems,
            manifest_crc32=check.manifest_crc32,
            num_shards=check.num_shards,
            num_bytes=check.num_bytes,
            checked_shards=check.checked,
            checked_bytes=check.checked_bytes,
        )

    def _measure_links(self, facts: Sequence[HostFacts | None]) -> tuple[list[LinkFacts | None], str]:
        """Let the ranks of all hosts measure, if every host can; say why not."""
        options, meeting = self._options, self._meeting
        present = meeting.present
        nothing: list[LinkFacts | None] = [None] * options.nnodes
        # Equal on all hosts: made of what all have heard.
        why_not = _why_no_links(options, meeting, facts)
        if why_not:
            return nothing, why_not
        port = meeting.gather("the port", free_port() if meeting.is_head else None, LINKS_TIMEOUT_S)[0]
        job = LinkJob(
            index=present.index(meeting.index),
            num_hosts=len(present),
            nproc=options.nproc,
            master_address=meeting.place.head,
            master_port=int(port),
            timeout_s=LINKS_TIMEOUT_S,
        )
        found = meeting.gather("link speeds", self._probes.links(job).model_dump(), LINKS_TIMEOUT_S)
        return [LinkFacts.model_validate(each) if each else None for each in found], ""

    def _report(
        self,
        facts: list[HostFacts | None],
        links: list[LinkFacts | None],
        why_no_links: str,
        planning: Future[PlanFacts],
    ) -> bool:
        """Judge and print; return whether a check failed."""
        evidence = Evidence(
            config=self._config,
            nproc=self._options.nproc,
            endpoint=self._meeting.place.endpoint,
            hardware=self._hardware,
            cards=self._cards,
            absent=self._meeting.absent,
            known_names=_expected_names() | {i: n for i, n in self._meeting.absent_names.items() if n},
            arrived_s=self._meeting.arrived_s,
            facts=facts,
            plan=planning.result(),
            links=links,
            why_no_links=why_no_links,
        )
        findings = judge(evidence)
        form = report_as_json if self._options.as_json else format_report
        print(form(evidence, findings, time.monotonic() - self._begin_s), flush=True)
        return any(finding.status == "FAIL" for finding in findings)


def _why_no_links(options: Options, meeting: Meeting, facts: Sequence[HostFacts | None]) -> str:
    """Say what makes measuring the links pointless, or would make it hang."""
    if not options.measures_links:
        return "not asked for (--no-links)"
    missing = [index for index in range(options.nnodes) if index not in meeting.present or facts[index] is None]
    if missing:
        return "not all hosts are there"
    known = [each for each in facts if each is not None]
    if any(reached.port_error or reached.name_error for each in known for reached in each.reached):
        return "not all hosts reach each other"
    if len({each.versions.get("torch") for each in known}) > 1:
        return "the versions of torch differ"
    if len(known) > 1 and not is_loopback(str(meeting.roster[0]["address"] if meeting.roster[0] else "")):
        cards = [Card.model_validate(card) for card in meeting.roster if card]
        if not known[0].gpus and any(is_loopback(card.gloo_address) for card in cards):
            return "gloo would give a loopback address to other hosts"
    return ""


def _open_data_port(options: Options, token: str, probes: Senses) -> DataPort:
    try:
        return probes.data_port(token, options.data_port)
    except OSError as error:
        raise MeetingError(
            f"cannot listen on data port {options.data_port}: {error.strerror}; take another one with --data-port, or "
            "none (any free port)"
        ) from None


def make_place(options: Options) -> Place:
    """Return this host's place in the job.

    Raises:
        UsageError: where the hosts meet is not HOST:PORT.
    """
    head, _, port = options.rdzv_endpoint.rpartition(":")
    if not head or not port.isdigit():
        raise UsageError(f"--rdzv-endpoint {options.rdzv_endpoint}: give the first host and a port, as in n1:29500")
    return Place(options.nnodes, head.strip("[]"), int(port), options.job, options.index, options.wait_s)


def _tell(progress: str) -> None:
    print(f"papilio preflight: {progress}", file=sys.stderr, flush=True)


def _expected_names() -> dict[int, str]:
    """Return the names that Slurm has for the job's hosts, by number; none under another scheduler."""
    groups = {int(key.removeprefix(HET_GROUP)): value for key, value in os.environ.items() if key.startswith(HET_GROUP)}
    node_list = ",".join(groups[number] for number in sorted(groups)) or os.environ.get("SLURM_JOB_NODELIST", "")
    if not node_list:
        return {}
    try:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(enumerate(shown.stdout.split()))


def read_options(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line of a worker."""
    parser = argparse.ArgumentParser(prog="papilio.launch.preflight.worker", description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--nnodes", type=int, required=True)
    parser.add_argument("--nproc", type=int, required=True)
    parser.add_argument("--host")
    parser.add_argument("--rdzv-endpoint", default=Options.rdzv_endpoint)
    parser.add_argument("--index", type=int)
    parser.add_argument("--job", default="preflight")
    parser.add_argument("--wait-s", type=float, default=Options.wait_s)
    parser.add_argument("--data-port", type=int, default=0)
    parser.add_argument("--read-gib", type=float, default=Options.read_gib)
    parser.add_argument("--no-links", action="store_false", dest="measures_links")
    parser.add_argument("--json", action="store_true", dest="as_json")
    parser.add_argument("--failure-status", type=int, default=1, help="status that says that something must be fixed")
    parser.add_argument("--host-name", dest="name", help="default: what the machine says")
    parsed, overrides = parser.parse_known_args(arguments)
    return Options(**vars(parsed), overrides=tuple(overrides))


if __name__ == "__main__":
    sys.exit(main())
