"""Several hosts without a scheduler, each with a network of its own: hosts are lost, come back, and lose their link."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.faults_data import TYPES_OF_CHANGING_RANKS, Size, write_data, write_recipe
from benchmarks.faults_evidence import lineage, lost_and_repeated
from tests.support.host_jobs import HostJob, last_step, prepare, set_limit, trained, wait_until
from tests.support.host_namespaces import HostNamespaces, why_not_here

pytestmark = pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or "-")
RESUME, NO_RESTART = 75, 78
# More than the 12.6 s after which TCP has tried for the sixth time: a link that is back is found out in time.
STALL_TIMEOUT_S = 15
SIZE = Size({"a": 300, "b": 200, "c": 100, "d": 20}, 503, 25, 8, 8, 7)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostNamespaces]:
    with HostNamespaces(tmp_path_factory.mktemp("hosts"), ["n1", "n2", "n3", "n4", "n5"]) as hosts:
        yield hosts


@pytest.fixture(scope="module", autouse=True)
def host_left_alone(hosts: HostNamespaces, tmp_path_factory: pytest.TempPathFactory) -> HostJob:
    """Its job needs another host, which is lost; it waits while other tests run."""
    folder = tmp_path_factory.mktemp("left_alone")
    command = ["-m", *toy(folder, "2", "n4", join_timeout_s=20)]
    left, _ = HostJob(hosts, "n4", command, folder), HostJob(hosts, "n5", command, folder)
    toy_goes_on(folder)
    hosts.kill("n5")
    return left


@pytest.fixture
def start(hosts: HostNamespaces, tmp_path: Path) -> Iterator[Callable[..., HostJob]]:
    def begin(host: str, *words: str) -> HostJob:
        return HostJob(hosts, host, ["-m", *words], tmp_path)

    yield begin
    for name in ("n1", "n2", "n3"):
        hosts.plug_in(name)
        hosts.kill(name)


def training(folder: Path, endpoint: str, nnodes: str) -> list[str]:
    """The command that trains on each host; it stands still at steps that a test sets."""
    write_data(str(folder / "data"), SIZE)
    recipe = write_recipe(str(folder / "recipe.toml"), str(folder / "data"), SIZE, TYPES_OF_CHANGING_RANKS)
    words = ["papilio.launch.cli", "train", "--recipe", recipe, "--nproc", "1", "--nnodes", nnodes]
    return [*words, "--rdzv-endpoint", endpoint, f"--output.run_dir={folder / 'run'}"]


def wait_for_step(folder: Path, step: int, world_size: int, *jobs: HostJob) -> None:
    def outputs() -> str:
        return "\n".join(f"--- {job.host}\n{job.output}" for job in jobs)

    wait_until(lambda: last_step(folder, world_size) >= step, f"step {step} on {world_size}\n", 120, outputs)


def test_training_outlives_its_first_host_and_trains_every_sample_once(
    hosts: HostNamespaces, start: Callable[..., HostJob], tmp_path: Path
) -> None:
    """Two hosts and a store on a third; the first is lost and comes back."""
    prepare(tmp_path, limit=30)
    store = start("n3", "papilio.launch.cli", "rendezvous", "--port", "29400")
    command = training(tmp_path, "n3:29400", "1:2")
    first, second = start("n1", *command), start("n2", *command)
    wait_for_step(tmp_path, 30, 2, first, second)
    hosts.kill("n1")
    set_limit(tmp_path, 60)
    wait_for_step(tmp_path, 60, 1, second)
    again = start("n1", *command)
    second.wait_for("another host joins; the ranks save and start again")
    set_limit(tmp_path, 90)
    wait_for_step(tmp_path, 90, 2, again, second)
    set_limit(tmp_path, 10_000)
    assert (again.wait(), second.wait()) == (0, 0), again.output + second.output
    assert "rank 0 (host n1) failed first: went away without reporting an error after step " in second.output
    assert "papilio: starting again on 1 rank" in second.output
    store.terminate()
    assert store.wait() == 0
    steps = lineage(trained(tmp_path), SIZE.num_steps)
    assert lost_and_repeated(steps, SIZE) == (0, 0)


def toy(folder: Path, nnodes: str, first: str = "n1", join_timeout_s: int = 60) -> list[str]:
    """An agent with one rank of the toy job, which does not end by itself."""
    waits = f"join_timeout={join_timeout_s},store_timeout=60,last_call_timeout=1"
    words = [
        "papilio.trainer.elastic.agent",
        f"--nnodes={nnodes}",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        "--max-restarts=5",
    ]
    words += [f"--rdzv-conf={waits},keep_alive_interval=1,keep_alive_max_attempt=3", f"--rdzv-endpoint={first}:29400"]
    words += ["--rdzv-id=toy", "--tee=3", "--role=", "-m", "--", "tests.support.toy_job", str(folder)]
    return [*words, "--steps=1000000", f"--stall-timeout-s={STALL_TIMEOUT_S}"]


def toy_goes_on(folder: Path) -> None:
    """Wait until the toy job has made some steps more."""
    checkpoint = folder / "checkpoint"

    def step() -> int:
        return int(checkpoint.read_text()) if checkpoint.exists() else 0

    begin = step()
    wait_until(lambda: step() > begin + 10, f"steps after {begin}")


def test_a_link_that_fails_and_a_first_host_that_is_lost_stop_the_job_for_a_while_only(
    hosts: HostNamespaces, start: Callable[..., HostJob], tmp_path: Path
) -> None:
    command = toy(tmp_path, "1:2")
    first, second = start("n1", *command), start("n2", *command)
    first.wait_for(" on 2")  # whichever host is there first may begin alone
    toy_goes_on(tmp_path)
    num_starts = first.output.count("starting again")

    hosts.unplug("n2")
    first.wait_for("papilio: host n2 has given no heartbeat for 3 s; the ranks wait for it")
    hosts.plug_in("n2")
    first.wait_for("papilio: host n2 is there again")
    toy_goes_on(tmp_path)
    assert first.output.count("starting again") == num_starts, "a link that comes back in time changes nothing"

    hosts.unplug("n2")
    first.wait_for("rank 1 has not arrived at step ")
    first.wait_for("papilio: starting again on 1 rank")
    toy_goes_on(tmp_path)
    second.wait_for("papilio: the store at n1:29400 does not answer (")
    hosts.plug_in("n2")
    first.wait_for("papilio: another host joins; the ranks save and start again")
    second.wait_for("papilio: starting again on 2 ranks")
    toy_goes_on(tmp_path)

    other = start("n3", *command, "--step-s=0.01")
    assert other.wait() == NO_RESTART, other.output
    refused = "at n1:29400, host n1 runs a job with other settings: nothing more there, --step-s=0.01 here; start the"
    assert refused in other.output
    assert first.output.count("starting again") == num_starts + 2

    hosts.kill("n1")
    second.wait_for("papilio: waiting up to 60 s for the store at n1:29400: connection refused")
    again = start("n1", *command)
    again.wait_for(" on 2")
    toy_goes_on(tmp_path)
    again.terminate()
    assert again.wait() == RESUME, again.output
    second.terminate()
    assert second.wait() == RESUME, second.output


def test_a_job_that_needs_a_lost_host_ends_and_names_it(host_left_alone: HostJob) -> None:
    assert host_left_alone.wait() == 1, host_left_alone.output
    last = host_left_alone.output.splitlines()[-1]
    assert last.startswith(
        "papilio: error: rank 1 (host n5) failed first: went away without reporting an error after step "
    )
    assert last.endswith("fewer than 2 hosts came to n4:29400 within 20 s; the same command must run on each of them")
