import configparser
import subprocess
import sys
from pathlib import Path

import pytest

from papilio.launch.version_set import TORCHREC_NEEDS, VERSION_SETS

REPOSITORY = Path(__file__).resolve().parents[2]


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(REPOSITORY / "launch" / "version_set.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("arguments", "requirements"),
    [
        (["cpu"], "torch==2.13.0 fbgemm-gpu-cpu==1.8.0 tensordict>=0.8 torchmetrics==1.0.3"),
        (["cuda"], "torch==2.13.0 fbgemm-gpu==1.8.0 tensordict>=0.8 torchmetrics==1.0.3"),
        (["cpu", "--no-deps"], "torchrec==1.8.0"),
        (["cuda", "--torch", "2.11.0"], "torch==2.11.0 fbgemm-gpu==1.6.0 tensordict>=0.8 torchmetrics==1.0.3"),
        (["cpu", "--torch", "2.11.0", "--no-deps"], "torchrec==1.6.1"),
    ],
)
def test_the_script_prints_what_pip_should_install(arguments: list[str], requirements: str) -> None:
    assert run_script(*arguments).stdout == requirements + "\n"


def test_an_unsupported_torch_is_refused() -> None:
    done = run_script("cpu", "--torch", "2.0.0")
    assert done.returncode == 2
    assert "2.13.0" in done.stderr
    assert "2.11.0" in done.stderr


def test_the_extras_of_the_package_are_the_first_version_set() -> None:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    extras = setup["options.extras_require"]
    for device in ("cpu", "cuda"):
        assert extras[device].split() == VERSION_SETS[0].requirements(device)
    assert f"torchrec=={VERSION_SETS[0].torchrec}" in (REPOSITORY / "setup.cfg").read_text()


def test_plain_pip_is_asked_for_nothing_that_needs_torch() -> None:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    required = {line.split(">")[0].split("=")[0] for line in setup["options"]["install_requires"].split()}
    needing_torch = {requirement.split(">")[0].split("=")[0] for requirement in TORCHREC_NEEDS}
    assert required.isdisjoint({"torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"} | needing_torch)
