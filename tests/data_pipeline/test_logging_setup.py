import subprocess
import sys

import pytest

LOG = """
import logging, sys
from papilio.data_pipeline.logging_setup import setup_logging
logging.basicConfig(format="of a library: %(message)s")
setup_logging(sys.argv[1], int(sys.argv[2]))
assert "torch" not in sys.modules
for name in ("papilio.x", "other", "torchrec"):
    logging.getLogger(name).info("%s info", name)
    logging.getLogger(name).warning("%s warning", name)
"""


def lines_of(role: str, rank: int) -> list[str]:
    done = subprocess.run([sys.executable, "-c", LOG, role, str(rank)], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    ("role", "rank", "lines"),
    [
        ("rank", 0, ["WARNING: papilio.x warning", "WARNING: other warning"]),
        ("rank", 3, ["WARNING: rank 3: papilio.x warning", "WARNING: rank 3: other warning"]),
        ("tool", 0, ["papilio.x info", "papilio.x warning", "other warning"]),
    ],
)
def test_each_role_shows_what_its_reader_needs(role: str, rank: int, lines: list[str]) -> None:
    assert lines_of(role, rank) == lines


def test_a_server_dates_its_lines() -> None:
    first, *rest = lines_of("server", 0)
    assert first.endswith(" INFO papilio.x info")
    assert first[:2] == "20"
    assert len(rest) == 2
