from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slurm_cluster import SlurmCluster
from tests.support.slurm_programs import NoSlurmError, SlurmPrograms, find_slurm

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def slurm_programs() -> SlurmPrograms:
    try:
        return find_slurm()
    except NoSlurmError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def slurm(slurm_programs: SlurmPrograms, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A cluster of three hosts, in whose environment this process is: Slurm's programs are on PATH."""
    with SlurmCluster(slurm_programs, num_hosts=3) as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.chdir(tmp_path_factory.mktemp("submitted_from"))
        yield cluster
