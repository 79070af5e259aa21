import shutil

import pytest

from papilio.launch import cli
from tests.support.checkpoint_runs import make_config, run_train
from tests.support.datasets import write_dataset


@pytest.fixture(scope="session")
def original(one_rank, two_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint_jobs")
    data = write_dataset(folder / "data")
    two_ranks.run(run_train, make_config(data, folder / "runs" / "first", 15, 0.1, ["column_wise"]))
    one_rank.run(run_train, make_config(data, folder / "runs" / "first", 20, 0.05, ["table_wise"]))
    return folder / "runs" / "first"


@pytest.fixture
def run(original, tmp_path):
    """A copy of the run's folder."""
    shutil.copytree(original, tmp_path / "runs" / "first")
    return tmp_path / "runs" / "first"


@pytest.fixture
def papilio(capsys, monkeypatch):
    """`papilio checkpoint` with these words, on a terminal of so many columns: status, output, errors."""

    def call(*words, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        status = cli.main(["checkpoint", *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
