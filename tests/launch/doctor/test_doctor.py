import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pytest

from papilio.launch.doctor import doctor
from papilio.launch.doctor.installation import (
    DISTRIBUTIONS,
    PROBE_TIMEOUT_S,
    Installation,
    Probe,
    inspect_installation,
    run_probe,
)

CPU_PROBE = Probe(torch_loads=True, has_gloo=True, fbgemm_loads=True, torchrec_loads=True)
CUDA_PROBE = dataclasses.replace(CPU_PROBE, torch_cuda="13.0", num_visible_gpus=1, has_nccl=True)
CPU_VERSIONS = dict.fromkeys(DISTRIBUTIONS, "1.0") | {
    "torch": "2.13.0+cpu",
    "fbgemm-gpu-cpu": "1.8.0",
    "fbgemm-gpu": None,
    "torchrec": "1.8.0",
    "torchx": None,
    "torchx-nightly": "2026.10.26",
}
CUDA_VERSIONS = CPU_VERSIONS | {"torch": "2.13.0", "fbgemm-gpu-cpu": None, "fbgemm-gpu": "1.8.0"}
SOUND = Installation(
    python=(3, 11, 7),
    versions=CPU_VERSIONS,
    probe=CPU_PROBE,
    gpus=(),
    driver=None,
    torchrun="/env/bin/torchrun",
    num_cores=2,
    memory_bytes=24 << 30,
    shared_memory_bytes=12 << 30,
    bin_folder="/env/bin",
)
SOUND_CUDA = dataclasses.replace(SOUND, versions=CUDA_VERSIONS, probe=CUDA_PROBE, gpus=("GPU 0: H100",), driver="580.1")


def change(installation: Installation = SOUND, **changes: object) -> Installation:
    versions = changes.pop("versions", {})
    probe = changes.pop("probe", {})
    return dataclasses.replace(
        installation,
        versions={**installation.versions, **versions},
        probe=dataclasses.replace(installation.probe, **probe),
        **changes,
    )


OLDER_TRIO = {"torch": "2.11.0+cu130", "fbgemm-gpu": "1.6.0", "torchrec": "1.6.1"}


@pytest.mark.parametrize("installation", [SOUND, SOUND_CUDA, change(SOUND_CUDA, versions=OLDER_TRIO)])
def test_sound_installations_pass(installation: Installation) -> None:
    checks = doctor.diagnose(installation)
    assert {check.status for check in checks} == {"ok"}
    assert {check.fix for check in checks} == {""}
    assert doctor.report(checks).endswith("this installation is sound")


INSTALL_CPU = "pip install torch==2.13.0 fbgemm-gpu-cpu==1.8.0 && pip install --no-deps torchrec==1.8.0"
REINSTALL_CPU = (
    "pip install --force-reinstall torch==2.13.0 fbgemm-gpu-cpu==1.8.0 "
    "&& pip install --force-reinstall --no-deps torchrec==1.8.0"
)
UNDEFINED_SYMBOL = {"fbgemm_loads": False, "torchrec_loads": False, "error": "undefined symbol: _ZN3c105Error"}


@pytest.mark.parametrize(
    ("installation", "name", "found", "fix"),
    [
        (change(python=(3, 10, 2)), "python", "3.10.2, needs 3.11 or newer", "make env PYTHON="),
        (
            change(versions={"torchrec": "1.6.1"}),
            "version set",
            "torchrec 1.6.1: not one of the supported version sets",
            INSTALL_CPU,
        ),
        (
            change(versions={"torch": "2.11.0+cpu"}),
            "version set",
            "torch 2.11.0 + fbgemm 1.6.0 + torchrec 1.6.1",
            "pip install torch==2.11.0 fbgemm-gpu-cpu==1.6.0 && pip install --no-deps torchrec==1.6.1",
        ),
        (change(versions={"torch": None}), "version set", "torch None", INSTALL_CPU),
        (
            change(SOUND_CUDA, versions={"torchrec": None, "fbgemm-gpu": None, "fbgemm-gpu-cpu": "1.8.0"}),
            "version set",
            "torchrec None",
            "pip uninstall -y fbgemm-gpu-cpu && pip install torch==2.13.0 fbgemm-gpu==1.8.0 && pip install --no-deps",
        ),
        (
            change(versions={"fbgemm-gpu": "1.8.0"}),
            "fbgemm build",
            "both fbgemm-gpu and fbgemm-gpu-cpu are installed",
            "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && pip install fbgemm-gpu-cpu==1.8.0",
        ),
        (
            change(SOUND_CUDA, versions={"fbgemm-gpu-cpu": "1.8.0"}),
            "fbgemm build",
            "both fbgemm-gpu and fbgemm-gpu-cpu are installed",
            "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && pip install fbgemm-gpu==1.8.0",
        ),
        (
            change(SOUND_CUDA, versions={"fbgemm-gpu-cpu": "1.8.0", "fbgemm-gpu": None}),
            "fbgemm build",
            "fbgemm is the CPU build, torch is built for CUDA 13.0",
            "pip uninstall -y fbgemm-gpu-cpu && pip install fbgemm-gpu==1.8.0",
        ),
        (
            change(versions={"fbgemm-gpu-cpu": None, "fbgemm-gpu": "1.8.0"}),
            "fbgemm build",
            "fbgemm is the CUDA build, torch is built for CPU only",
            "pip uninstall -y fbgemm-gpu && pip install fbgemm-gpu-cpu==1.8.0",
        ),
        (change(versions={"fbgemm-gpu-cpu": None}), "fbgemm build", "fbgemm is not installed", INSTALL_CPU),
        (change(probe=UNDEFINED_SYMBOL), "loading", "undefined symbol: _ZN3c105Error", REINSTALL_CPU),
        (
            change(versions={"fbgemm-gpu-cpu": None, "fbgemm-gpu": "1.8.0"}, probe=UNDEFINED_SYMBOL),
            "loading",
            "undefined symbol",
            "fix the fbgemm build first",
        ),
        (change(probe=UNDEFINED_SYMBOL), "operators", "fbgemm does not load", "fix the loading first"),
        (
            change(probe={"missing_operators": ("permute_2D_sparse_data",)}),
            "operators",
            "fbgemm lacks permute_2D_sparse_data",
            REINSTALL_CPU,
        ),
        (
            change(versions={"tensordict": None, "torchmetrics": None}),
            "packages",
            "not installed: tensordict, torchmetrics",
            "pip install tensordict torchmetrics==1.0.3",
        ),
        (
            change(versions={"torchx-nightly": None}),
            "torchx",
            "not installed",
            "pip install torchx-nightly==2026.10.26",
        ),
        (
            change(versions={"torchx": "0.7.0", "torchx-nightly": None}),
            "torchx",
            "torchx 0.7.0 is installed; Papilio uses torchx-nightly",
            "pip uninstall -y torchx && pip install torchx-nightly==2026.10.26",
        ),
        (
            change(versions={"torchx": "0.7.0"}),
            "torchx",
            "both torchx 0.7.0 and torchx-nightly 2026.10.26",
            "pip uninstall -y torchx torchx-nightly && pip install torchx-nightly==2026.10.26",
        ),
        (change(probe={"has_gloo": False}), "communication", "neither gloo nor NCCL", REINSTALL_CPU),
        (
            change(SOUND_CUDA, probe={"has_nccl": False}),
            "communication",
            "torch was built with gloo",
            "fbgemm-gpu==1.8",
        ),
    ],
)
def test_failures_say_what_is_wrong_and_the_fix(installation: Installation, name: str, found: str, fix: str) -> None:
    checks = doctor.diagnose(installation)
    (check,) = (check for check in checks if check.name == name)
    assert check.status == "FAIL"
    assert found in check.found
    assert fix in check.fix
    assert f"fix: {check.fix}" in doctor.report(checks)
    assert "checks failed" in doctor.report(checks)


@pytest.mark.parametrize(
    ("installation", "name", "found", "fix"),
    [
        (change(gpus=("GPU 0",), driver="580.1"), "gpu", "torch is built for CPU only", "make env DEVICE=cuda"),
        (change(SOUND_CUDA, probe={"num_visible_gpus": 0}), "gpu", "torch sees 0 of them", "CUDA_VISIBLE_DEVICES"),
        (
            change(probe={"torch_cuda": "13.0", "has_nccl": True}),
            "fbgemm build",
            "fbgemm is the CPU build, torch is built for CUDA 13.0; it works here, where there is no GPU",
            "once there is one: pip uninstall -y fbgemm-gpu-cpu && pip install fbgemm-gpu==1.8.0",
        ),
        (change(torchrun=None), "torchrun", "not on PATH", 'export PATH="/env/bin:$PATH"'),
        (change(memory_bytes=4 << 30), "machine", "4.0 GiB of memory", "--nproc 1"),
        (change(shared_memory_bytes=64 << 20), "shared memory", "/dev/shm has 0.06 GiB", "--shm-size=8g"),
    ],
)
def test_warnings_say_what_is_wrong_and_the_fix(installation: Installation, name: str, found: str, fix: str) -> None:
    (check,) = (check for check in doctor.diagnose(installation) if check.status == "warn")
    assert (check.name, found in check.found, fix in check.fix) == (name, True, True)


@pytest.mark.parametrize(("installation", "status"), [(SOUND, 0), (change(torchrun=None), 0)])
def test_the_exit_status_is_1_only_for_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], installation: Installation, status: int
) -> None:
    monkeypatch.setattr(doctor, "inspect_installation", lambda: installation)
    assert doctor.run(argparse.Namespace(json=True)) == status
    checks = json.loads(capsys.readouterr().out)
    assert [set(check) for check in checks] == [{"name", "status", "found", "fix"}] * len(checks)
    assert doctor.run(argparse.Namespace(json=False)) == status


def test_this_installation_loads() -> None:
    installation = inspect_installation()
    assert installation.probe.error is None
    assert installation.probe.torchrec_loads
    assert installation.probe.missing_operators == ()


def probe_script(tmp_path: Path, source: str) -> Probe:
    path = tmp_path / "probe.py"
    path.write_text(source)
    return run_probe([sys.executable, str(path)])


def test_a_crash_while_loading_is_reported(tmp_path: Path) -> None:
    source = 'import os\nprint(\'{"torch_loads": true, "torch_cuda": "13.0"}\', flush=True)\nos.kill(os.getpid(), 11)'
    assert probe_script(tmp_path, source) == Probe(torch_loads=True, torch_cuda="13.0", error="ended by signal 11")


def test_an_undefined_symbol_is_reported(tmp_path: Path) -> None:
    source = 'raise OSError("fbgemm_gpu_py.so: undefined symbol: _ZN")'
    assert probe_script(tmp_path, source).error == "OSError: fbgemm_gpu_py.so: undefined symbol: _ZN"


def test_loading_that_hangs_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("papilio.launch.doctor.installation.PROBE_TIMEOUT_S", 1)
    assert "took more than 1 s" in str(probe_script(tmp_path, "import time; time.sleep(60)").error)
    assert PROBE_TIMEOUT_S == 180
