from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.rank_pool import RankPool
from tests.support.storages import Pauses

if TYPE_CHECKING:
    from tests.support.s3_stand_in import S3StandIn


REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def python_path() -> Iterator[None]:
    """Lets processes that tests start find `tests.support`, as pytest does; papilio is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        yield


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A state folder of the tests' own, in which builds of formats are noted: not that of whoever runs them."""
    folder = str(tmp_path_factory.mktemp("state"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", folder)
        yield folder


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def three_ranks() -> Iterator[RankPool]:
    pool = RankPool(3)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    """Two hosts of two ranks, as far as anyone can see."""
    pool = RankPool(4, local_world_size=2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def s3_stand_in() -> Iterator[S3StandIn]:
    from tests.support.s3_stand_in import S3StandIn

    stand_in = S3StandIn()
    yield stand_in
    stand_in.close()


@pytest.fixture
def s3(s3_stand_in: S3StandIn, monkeypatch: pytest.MonkeyPatch) -> S3StandIn:
    """An S3 service on loopback with an empty bucket; boto3 finds it, in processes started from here on too."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_stand_in.environment.items():
        monkeypatch.setenv(name, value)
    s3_stand_in.new_bucket()
    return s3_stand_in


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()
