"""Whole preflights of hosts on loopback, each with one thing wrong: found, with its host and its fix."""

import json
import shutil
import time

import pytest

from papilio.launch.preflight.facts import Gpu, LinkFacts, PlanFacts
from papilio.launch.preflight.reach import DataPort
from tests.support.datasets import write_dataset
from tests.support.preflight_hosts import (
    CODE,
    GIB,
    MB,
    PLAN,
    VERSIONS,
    FakeHost,
    common_options,
    findings_of,
    run_hosts,
)

NAMES = ("127.0.0.11", "127.0.0.12", "127.0.0.13")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("preflight") / "data")


@pytest.fixture
def hosts(data, tmp_path, monkeypatch):
    monkeypatch.setattr("papilio.launch.preflight.folders.SEEN_TIMEOUT_S", 0.3)
    return [FakeHost(name, data, str(tmp_path / "runs")) for name in NAMES]


@pytest.fixture
def preflight(capsys):
    """Run a preflight of these hosts and return its report."""

    def run(hosts, present=None, **options):
        run_hosts(hosts, common_options(len(hosts), as_json=True, **options), present=present)
        return json.loads(capsys.readouterr().out)

    return run


def test_hosts_with_nothing_wrong_are_ready(hosts, preflight, tmp_path) -> None:
    report = preflight(hosts)
    assert report["is_ready"]
    assert findings_of(report) == findings_of(report, "warn") == []
    assert [host.status for host in hosts] == [0, 0, 0]
    assert {finding["check"]: finding["hosts"] for finding in report["findings"]} == {
        **{name: list(NAMES) for name in ("arrival", "names", "ports", "clocks", "versions", "code", "recipe")},
        **{name: list(NAMES) for name in ("gpus", "memory", "run folder", "room", "data", "links")},
        "plan": [],
    }
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_name_that_does_not_resolve(hosts, preflight) -> None:
    hosts[2].name = "gone.invalid"
    report = preflight(hosts)
    (names,) = findings_of(report)
    assert names[:2] == ("names", ["gone"])
    assert "its name gone.invalid does not resolve" in names[2]
    assert "on 127.0.0.11, 127.0.0.12" in names[2]
    assert 'echo "127.0.0.1 gone.invalid" | sudo tee -a /etc/hosts' in names[3]
    assert [host.status for host in hosts] == [1, 1, 1]
    assert findings_of(report, "warn") == [
        ("links", [], "not measured: not all hosts reach each other", "the lines above come first")
    ]


def test_a_port_that_is_closed(hosts, preflight) -> None:
    def closed(token, port):
        data_port = DataPort(token, port)
        data_port.close()
        return data_port

    hosts[1].probes["data_port"] = closed
    (ports,) = findings_of(preflight(hosts))
    assert ports[:2] == ("ports", ["127.0.0.12"])
    assert ports[2].startswith("127.0.0.11, 127.0.0.13 to 127.0.0.12 (127.0.0.12:")
    assert ports[2].endswith("connection refused")
    assert ports[3].startswith("let TCP pass from 127.0.0.11, 127.0.0.13 to 127.0.0.12")


def test_a_port_that_leads_to_another_host(hosts, preflight) -> None:
    hosts[1].probes["data_port"] = lambda token, port: DataPort("another", port)
    (ports,) = findings_of(preflight(hosts))
    assert (ports[0], ports[1]) == ("ports", ["127.0.0.12"])
    assert ports[2].endswith("leads to another host than its own")


def test_a_version_and_code_that_differ(hosts, preflight) -> None:
    hosts[1].probes["versions"] = lambda: {**VERSIONS, "torch": "2.11.0", "torchx": "0.7.0"}
    hosts[2].probes["code"] = lambda: {**CODE, "trainer": "ffffff", "torch": "888888"}
    torch, torchx, ours, build = findings_of(preflight(hosts))
    assert torch == (
        "versions",
        ["127.0.0.12"],
        "torch 2.11.0, elsewhere 2.13.0",
        "there: pip install --no-deps torch==2.13.0",
    )
    assert torchx[1:] == (["127.0.0.12"], "torchx 0.7.0, elsewhere none", "there: pip uninstall torchx")
    assert ours[:3] == ("code", ["127.0.0.13"], "package trainer has other files (ffffff) than elsewhere (0a1b2c)")
    assert ours[3] == "bring the same checkout or wheel there, or run all hosts from one shared folder"
    assert build[:3] == ("code", ["127.0.0.13"], "torch is another build (888888) than elsewhere (777777)")


def test_a_disk_that_is_nearly_full(hosts, preflight, tmp_path) -> None:
    hosts[1].probes["free_bytes"] = lambda _: 300 * MB
    for host in hosts:
        host.probes["plan"] = lambda *_: PLAN.model_copy(update={"model_bytes": 2 * GIB})
    (room,) = findings_of(preflight(hosts))
    assert room[:2] == ("room", ["127.0.0.12"])
    needed = "8.00 GiB are needed, for 4 checkpoints of 2.00 GiB"  # two kept, the best, and the one being written
    assert room[2] == f"286 MiB free in {tmp_path}/runs; {needed}"
    assert "--checkpoint.folder=s3://bucket/prefix" in room[3]


def test_a_run_folder_of_its_own(hosts, preflight, tmp_path) -> None:
    hosts[2].runs = str(tmp_path / "elsewhere")
    theirs, own = findings_of(preflight(hosts))
    wrote = "there does not show what"
    assert theirs[1:3] == (["127.0.0.11", "127.0.0.12"], f"{tmp_path}/runs {wrote} 127.0.0.13 wrote to theirs")
    assert own[1:3] == (["127.0.0.13"], f"{tmp_path}/elsewhere {wrote} 127.0.0.11, 127.0.0.12 wrote to theirs")
    assert "--output.runs_dir=/shared/runs" in own[3]


def test_run_folders_on_local_disks(hosts, preflight, tmp_path) -> None:
    for index, host in enumerate(hosts):
        host.runs = str(tmp_path / f"disk{index}")
    (folders,) = findings_of(preflight(hosts))
    assert folders[:3] == ("run folder", list(NAMES), f"{tmp_path}/disk0 is another folder on every host")


def test_a_run_folder_that_cannot_be_written(hosts, preflight, tmp_path) -> None:
    (tmp_path / "file").touch()
    hosts[1].runs = str(tmp_path / "file" / "runs")
    (folder,) = findings_of(preflight(hosts))
    assert folder[:2] == ("run folder", ["127.0.0.12"])
    assert f"could not create folder {tmp_path}/file/runs" in folder[2]
    assert folder[3].endswith("(--output.runs_dir)")


def test_a_shard_that_is_missing_cut_or_changed(hosts, preflight, data, tmp_path) -> None:
    copies = [tmp_path / f"data{index}" for index in range(3)]
    for host, copy in zip(hosts, copies, strict=True):
        shutil.copytree(data, copy)
        host.data = str(copy)
    (copies[0] / "train" / "1.arrow").unlink()
    with (copies[1] / "test" / "0.arrow").open("ab") as file:
        file.write(b"more")
    content = bytearray((copies[2] / "train" / "0.arrow").read_bytes())
    content[-20] ^= 1
    (copies[2] / "train" / "0.arrow").write_bytes(content)
    missing, longer, changed = findings_of(preflight(hosts))
    fix = "restore it or preprocess the data again"
    assert missing == ("data", ["127.0.0.11"], f"shard {copies[0]}/train/1.arrow is missing", fix)
    assert longer[1] == ["127.0.0.12"] and f"shard {copies[1]}/test/0.arrow has " in longer[2]
    assert changed[1:] == (
        ["127.0.0.13"],
        f"shard {copies[2]}/train/0.arrow has another checksum than the manifest says",
        fix,
    )


def test_another_data_set(hosts, preflight, tmp_path) -> None:
    hosts[2].data = write_dataset(tmp_path / "other", seed=5)
    (found,) = findings_of(preflight(hosts))
    assert found[:2] == ("data", ["127.0.0.13"])
    assert "another data set than on 127.0.0.11: their manifests differ" in found[2]


@pytest.mark.parametrize(("shift_s", "words"), [(30.0, "30.0 s ahead of the others'"), (-2.5, "2.5 s behind the")])
def test_a_clock_that_is_off(hosts, preflight, shift_s, words) -> None:
    hosts[0].probes["now"] = lambda: time.time() + shift_s  # the clock that the others are compared with
    (clocks,) = findings_of(preflight(hosts))
    assert clocks[:2] == ("clocks", ["127.0.0.11"])
    assert words in clocks[2]
    assert clocks[3] == "there: sudo chronyc makestep (or: sudo systemctl restart systemd-timesyncd)"


def test_a_host_that_never_comes(hosts, preflight) -> None:
    report = preflight(hosts, present=(0, 2), wait_s=1.0)
    arrival, *others = findings_of(report)
    assert arrival[:2] == ("arrival", ["host 1"])
    assert arrival[2].startswith("did not come to 127.0.0.1:") and arrival[2].endswith(" within 1 s")
    assert "papilio logs" in arrival[3]
    assert others == []
    assert (hosts[0].status, hosts[1].status, hosts[2].status) == (1, None, 1)


def test_a_link_that_is_slow(hosts, preflight) -> None:
    hosts[2].mb_per_s = 90
    (links,) = findings_of(preflight(hosts))
    assert links[:2] == ("links", ["127.0.0.12", "127.0.0.13"])
    assert links[2].startswith("90.0 MB/s a rank from 127.0.0.12 to 127.0.0.13; ")
    assert "ethtool" in links[3]


def test_a_host_whose_links_are_all_slow(hosts, preflight) -> None:
    hosts[1].mb_per_s, hosts[2].mb_per_s = 90, 70
    (links,) = findings_of(preflight(hosts, host=None))  # held against each other, as no profile was named
    assert links[:2] == ("links", ["127.0.0.12"])
    assert links[2] == "70.0 MB/s a rank between it and both its neighbours; others reach 1.00 GB/s"


def test_a_link_that_is_worlds_slower_fails_whoever_the_hosts_are(hosts, preflight) -> None:
    """Neither that no profile was named nor that the hosts are one machine explains a factor of 800."""
    hosts[2].mb_per_s = 1.25
    (links,) = findings_of(preflight(hosts, host=None))
    assert links[2] == ("1.2 MB/s a rank from 127.0.0.12 to 127.0.0.13; others reach 1.00 GB/s, 800 times as much")
    for host in hosts:
        host.name = "localhost"
    (links,) = findings_of(preflight(hosts, host=None))
    assert links[2].endswith("800 times as much")
    assert "ethtool" in links[3]


@pytest.mark.parametrize(
    ("rates", "found"),
    [
        ((1000, 1.25), "others reach 1.00 GB/s, 800 times as much"),
        (
            (1.25, 1.25),
            "more than 1.2 MB/s a rank from the one before; 1 Gbit/s Ethernet gives 125.0 MB/s",
        ),
        ((1000, 900), None),
    ],
)
def test_two_hosts_without_a_figure_of_their_network(hosts, preflight, rates, found) -> None:
    """A profile made on one host says nothing of the links between hosts."""
    for host, rate in zip(hosts, rates, strict=False):
        host.mb_per_s = rate
    links = findings_of(preflight(hosts[:2], host="cpu_laptop"))
    assert [line[0] for line in links] == ([] if found is None else ["links"])
    assert found is None or links[0][2].endswith(found)


def test_a_host_with_another_recipe_under_the_same_path(hosts, preflight) -> None:
    hosts[1].overrides = ("--optimizer.dense.learning_rate=0.2",)
    (recipe,) = findings_of(preflight(hosts))
    assert recipe == (
        "recipe",
        ["127.0.0.12"],
        "optimizer.dense.learning_rate = 0.2 there, elsewhere 0.03",
        "bring the same recipe file to all hosts",
    )


def test_ranks_that_do_not_come_to_the_end(hosts, preflight) -> None:
    hosts[1].probes["links"] = lambda job: LinkFacts(errors=("rank 1 was still in the all-reduce after 180 s",))
    (links,) = findings_of(preflight(hosts))
    assert links[:3] == ("links", ["127.0.0.12"], "rank 1 was still in the all-reduce after 180 s")


def test_a_plan_that_does_not_fit(hosts, preflight) -> None:
    hosts[0].probes["plan"] = lambda *_: PlanFacts(error="table t_a needs 41.2 GiB; use row_wise for it")
    (plan,) = findings_of(preflight(hosts))
    assert plan[:3] == ("plan", [], "table t_a needs 41.2 GiB; use row_wise for it")


def test_a_plan_that_fits_the_profile_and_not_the_host(hosts, preflight) -> None:
    hosts[0].probes["plan"] = lambda *_: PLAN.model_copy(update={"rank_device_bytes": (1 << 50, *[GIB] * 5)})
    (memory,) = findings_of(preflight(hosts))
    assert memory[:2] == ("memory", ["127.0.0.11"])
    assert memory[2] == "64.0 GiB of memory; the plan puts 1,024 TiB there"


def gpu(index, **differences):
    values = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 81_559 << 20, "used_bytes": 0, "uncorrected_errors": 0}
    return Gpu(index=index, **{**values, "is_slowed": False, "celsius": 34, **differences})


def test_gpus_that_are_few_broken_busy_or_others(hosts, preflight) -> None:
    for host in hosts:
        host.probes["plan"] = lambda *_: PLAN.model_copy(update={"device": "cuda", "hardware": "dgx_h100"})
    hosts[0].probes["gpus"] = lambda: ((gpu(0, uncorrected_errors=2),), "570.1", "")
    hosts[1].probes["gpus"] = lambda: ((), "", "")
    hosts[2].probes["gpus"] = lambda: ((gpu(0, used_bytes=9 * GIB, celsius=90),), "570.1", "")
    report = preflight(hosts, host="dgx_h100")
    found = [finding for finding in findings_of(report) if finding[0] == "gpus"]
    assert [finding[1:3] for finding in found] == [
        (["127.0.0.11"], "GPU 0 has 2 uncorrected memory errors"),
        (["127.0.0.12"], "0 GPUs for 1 ranks"),
        (["127.0.0.13"], "GPU 0 is in use: 9.00 GiB of 79.6 GiB"),
        (["127.0.0.12"], "none, elsewhere 1 x NVIDIA H100 80GB HBM3"),
    ]
    assert found[0][3] == "there: nvidia-smi --gpu-reset -i 0, or take the host out"
    warnings = [finding for finding in findings_of(report, "warn") if finding[0] == "gpus"]
    assert warnings[0][1:3] == (["127.0.0.13"], "GPU 0 is slowed down by its hardware, at 90 °C")
