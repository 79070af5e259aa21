from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING

import pytest

from tests.support.rank_pool import RankPool
from tests.support.storages import Pauses

if TYPE_CHECKING:
    from tests.support.s3_stand_in import S3StandIn


REPOSITORY = Path(__file__).resolve().parents[1]
RANK_FIXTURES = {"one_rank", "two_ranks", "three_ranks", "four_ranks"}
# Names by which a test, or a fixture of its module, starts ranks itself.
RANK_STARTERS = {"AgentProcess", "HostJob", "RankPool", "start_job"}
# Whole jobs, one after the other, and clusters to start before them.
E2E_TIMEOUT_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test as unit, multirank or e2e, and skip those of a GPU where there is none."""
    for item in items:
        if Path(item.path).is_relative_to(REPOSITORY / "tests" / "end_to_end"):
            item.add_marker("e2e")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(E2E_TIMEOUT_S))
        elif item.get_closest_marker("multirank") is None:
            item.add_marker("multirank" if _starts_ranks(item) else "unit")
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu and not _has_gpu():
        for item in needs_gpu:
            item.add_marker(
                pytest.mark.skip(reason="needs a GPU that torch can use (`papilio doctor` says what is lacking)")
            )


def _starts_ranks(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function):
        return False
    fixtures = [getattr(item.module, name, None) for name in item.fixturenames]
    functions = [inspect.unwrap(each) for each in (item.function, *fixtures) if callable(each)]
    used = set().union(*(_names_in(each.__code__) for each in functions if inspect.isfunction(each)))
    return bool(RANK_FIXTURES & set(item.fixturenames) or RANK_STARTERS & used)


def _names_in(code: CodeType) -> set[str]:
    """Global names and attributes that a function uses, those of functions inside it too."""
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


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
